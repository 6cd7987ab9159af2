"""Refusals: a configuration that Megatron would compute differently is turned away by name.

Every message starts with the architecture, names the field and its value, and says why and what to do.
"""

from typing import Any, NoReturn

from transformers import PretrainedConfig

from weightcast.sync.errors import UnsupportedModel

Fields = dict[str, Any]
"""Provider fields that a part of a configuration decides."""


def architecture_of(hf: PretrainedConfig) -> str:
    """The model class named in the configuration."""
    names = getattr(hf, "architectures", None)
    return names[0] if names else type(hf).__name__


def refuse(hf: PretrainedConfig, name: str, value: object, why: str, remedy: str) -> NoReturn:
    """Raise UnsupportedModel for a field's value."""
    raise UnsupportedModel(f"{architecture_of(hf)}: {name}={value!r} is not supported: {why}; {remedy}")


def require_absent(hf: PretrainedConfig, name: str, why: str, allowed: tuple[object, ...] = (None,)) -> None:
    """Refuse the configuration unless `name` is missing or one of the `allowed` values."""
    value = getattr(hf, name, None)
    if value is not None and value not in allowed:
        refuse(hf, name, value, why, f"use a model whose configuration has it as one of {list(allowed)}")
