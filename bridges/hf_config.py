"""Reads a model's configuration with the classes of transformers, and never runs a repository's code where they do.

Some models are published under a type of their own although every field is another's: `SAME_FIELDS` names them. Kimi K2
is one; its authors say that it is DeepSeek V3's architecture, under another name only to let engines tell them apart.

    config = read_config("path/to/kimi-k2")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

SAME_FIELDS: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Model types of config.json that transformers does not know, and those whose fields they have."""


def read_config(path: str | Path, *, trust_remote_code: bool = False, **hub_options: Any) -> PretrainedConfig:
    """The configuration of a folder, a config.json or a hub repository.

    `trust_remote_code` is for types that neither transformers nor `SAME_FIELDS` has. Raises what transformers raises.
    """
    fields, _ = PretrainedConfig.get_config_dict(path, **hub_options)
    kind = fields.get("model_type")
    if kind in SAME_FIELDS:
        return _make(fields, SAME_FIELDS[kind])
    trusted = trust_remote_code and kind not in CONFIG_MAPPING
    config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **hub_options)
    return config


def as_native(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, or the same fields in transformers' own class where it is of a repository's."""
    kind = SAME_FIELDS.get(config.model_type, config.model_type)
    if kind not in CONFIG_MAPPING or type(config) is CONFIG_MAPPING[kind]:
        return config
    return _make(config.to_dict(), kind)


def _make(fields: Mapping[str, Any], kind: str) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict({**fields, "model_type": kind})
    return config
