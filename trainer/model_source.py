"""From the section `model` to a provider: a checkpoint's, or that of a configuration which a recipe carries.

bridge, provider = open_model(cfg.model)
"""

from dataclasses import fields, replace
from typing import Any

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_config import config_of_fields
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ModelConfig
from weightcast.trainer.config.model import SOURCE_FIELDS


def open_bridge(model: ModelConfig) -> AutoBridge:
    """The bridge of `hf_path`, or else of `hf_config`, which asks no hub and reads no file. Raises `ConfigError`."""
    if model.hf_path:
        return AutoBridge.from_hf_pretrained(model.hf_path)
    if model.hf_config:
        return AutoBridge.from_hf_config(config_of_fields(model.hf_config))
    raise ConfigError(
        "no model: set model.hf_path to a Hugging Face folder, such as model.hf_path=path/to/hf, or take a recipe, "
        "such as recipe=llama32_1b.pretrain (`weightcast recipes` lists them)"
    )


def open_model(model: ModelConfig, *, load_weights: bool = True) -> tuple[AutoBridge, Any]:
    """The bridge and its provider with the section's settings, not finalised; no process group is made.

    With `load_weights` the weights of `hf_path` are read when the model is built, if the section wants them.
    """
    bridge = open_bridge(model)
    provider = bridge.to_megatron_provider(load_weights=load_weights and model.load_weights and bool(model.hf_path))
    apply_settings(model, provider)
    return bridge, provider


def apply_settings(model: ModelConfig, provider: Any) -> None:
    """Set what `model` says on `provider`; null leaves what is there."""
    for item in fields(model):
        value = getattr(model, item.name)
        if item.name not in SOURCE_FIELDS and value is not None:
            setattr(provider, item.name, value)


def open_planned_model(model: ModelConfig) -> tuple[AutoBridge, Any]:
    """As `open_model` without weights; of `hf_config` where there is one, so that planning a recipe asks no hub."""
    return open_model(replace(model, hf_path="" if model.hf_config else model.hf_path), load_weights=False)
