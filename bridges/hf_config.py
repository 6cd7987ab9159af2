"""Reads a model's configuration with the classes of transformers, and never runs a repository's code where they do.

Some models are published under a type of their own although every field is another's: `SAME_FIELDS` names them. Kimi K2
is one; its authors say that it is DeepSeek V3's architecture, under another name only to let engines tell them apart.
Any other type is read by the code that comes with it, where that is trusted, and its architecture then says whose
fields these are.

    config = read_config("path/to/kimi-k2")
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from weightcast.sync.errors import ConfigError

logger = logging.getLogger(__name__)
SAME_FIELDS: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Model types of config.json that transformers does not know, and those whose fields they have."""


def read_config(path: str | Path, *, trust_remote_code: bool = False, **hub_options: Any) -> PretrainedConfig:
    """The configuration of a folder, a config.json or a hub repository.

    `trust_remote_code` is for types that neither transformers nor `SAME_FIELDS` has. Raises what transformers raises,
    and `ValueError` for code that is not trusted.
    """
    fields, _ = PretrainedConfig.get_config_dict(path, **hub_options)
    kind = fields.get("model_type")
    if kind in SAME_FIELDS:
        return _make(fields, SAME_FIELDS[kind])
    known = kind in CONFIG_MAPPING
    code = (fields.get("auto_map") or {}).get("AutoConfig")
    if code is not None and not known and not trust_remote_code:
        raise ValueError(f"its model_type is read by code that comes with it ({code}), and that code is not trusted")
    trusted = trust_remote_code and not known
    return as_native(AutoConfig.from_pretrained(path, trust_remote_code=trusted, **hub_options))


def config_of_fields(fields: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that a config.json of these `fields` would give; nothing is read and no hub is asked.

    Raises `ConfigError` for a type that transformers does not know, and for values that it does not take.
    """
    kind = SAME_FIELDS.get(fields.get("model_type", ""), fields.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"model_type={kind!r} is not known to transformers {transformers.__version__}; give the fields of a "
            "config.json with its model_type, or install a newer transformers"
        )
    try:
        return _make(copy.deepcopy(dict(fields)), kind)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(
            f"transformers {transformers.__version__} cannot read the fields of a {kind} configuration: {error}; "
            "correct the field"
        ) from error


def as_native(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, or the same fields in transformers' own class where it is of a repository's.

    That class is the one of its type or, where transformers has no such type, of its architecture's name.
    """
    kind = SAME_FIELDS.get(config.model_type, config.model_type)
    if kind in CONFIG_MAPPING:
        return config if type(config) is CONFIG_MAPPING[kind] else _make(_fields_of(config), kind)
    native = _class_of_architecture(config)
    if native is None:
        return config
    fields = _fields_of(config)
    logger.warning(
        "%s is read as %s, which its architecture has in transformers; code of its own for the model does not run. "
        "Fields that it lacks have their defaults: %s",
        type(config).__name__,
        native.__name__,
        ", ".join(sorted(native().to_dict().keys() - fields.keys())) or "none",
    )
    return _make(fields, native.model_type)


def _class_of_architecture(config: PretrainedConfig) -> type[PretrainedConfig] | None:
    """The class of transformers that configures the architecture which `config` names, if there is one."""
    for name in config.architectures or ():
        found: type[PretrainedConfig] | None = getattr(getattr(transformers, name, None), "config_class", None)
        if found is not None and found.model_type in CONFIG_MAPPING:
            return found
    return None


def _fields_of(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of `config`, also under the common names that its class has for its own; not where its code is."""
    common = {name: getattr(config, name) for name in config.attribute_map if hasattr(config, name)}
    return {name: value for name, value in {**config.to_dict(), **common}.items() if name != "auto_map"}


def _make(fields: Mapping[str, Any], kind: str) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict({**fields, "model_type": kind})
    return config
