"""The setting `mixed_precision`, on a provider.

apply_precision("bf16_mixed", provider)
"""

from typing import Any

import torch

from weightcast.bridges.runtime import has_transformer_engine
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config.precision import PRECISIONS


def set_dtype(name: str | None, provider: Any) -> None:
    """The parameters' dtype alone, which is all that planning asks; `None` leaves the checkpoint's."""
    if name is not None:
        provider.set_dtype(getattr(torch, PRECISIONS[name].dtype))


def apply_precision(name: str | None, provider: Any) -> None:
    """Everything that `name` says. Raises `ConfigError` where this machine cannot compute so."""
    set_dtype(name, provider)
    settings = PRECISIONS[name].settings if name is not None else {}
    if settings and not has_transformer_engine():
        raise ConfigError(
            f"mixed_precision={name} needs a GPU and Transformer Engine, and this machine lacks them: install "
            "transformer_engine[pytorch] on a machine with GPUs, or set mixed_precision=bf16_mixed"
        )
    for setting, value in settings.items():
        setattr(provider, setting, value)
