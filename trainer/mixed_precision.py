"""The setting `mixed_precision`, on a provider; and its record and names, where users of Megatron-Bridge import them.

from weightcast.trainer.mixed_precision import MixedPrecisionConfig, bf16_mixed

apply_precision("bf16_mixed", provider)
"""

from typing import Any

import torch

from weightcast.bridges.runtime import has_cuda, has_transformer_engine
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config.precision import MixedPrecisionConfig, precision_record

__all__ = [
    "MixedPrecisionConfig",
    "apply_precision",
    "bf16_mixed",
    "fp16_mixed",
    "get_mixed_precision_config",
    "set_dtype",
]

FP8_SETTINGS = (
    "fp8",
    "fp8_recipe",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_wgrad",
    "fp8_dot_product_attention",
    "fp8_multi_head_attention",
)
FP4_SETTINGS = ("fp4", "fp4_recipe")


def get_mixed_precision_config(given: str | MixedPrecisionConfig) -> MixedPrecisionConfig:
    """The record that a name stands for, to change some of it. Raises `ConfigError` for an unknown name."""
    return precision_record(given)


def bf16_mixed() -> MixedPrecisionConfig:
    """bf16 weights and products, fp32 masters."""
    return precision_record("bf16_mixed")


def fp16_mixed() -> MixedPrecisionConfig:
    """fp16 weights and products, fp32 masters, a scaled loss, gradients reduced in fp16."""
    return precision_record("fp16_mixed")


def set_dtype(given: Any, provider: Any) -> None:
    """The parameters' dtype alone, which is all that planning asks; where nothing says one, the checkpoint's stays."""
    dtype = precision_record(given).dtype
    if dtype is not None:
        provider.set_dtype(getattr(torch, dtype))


def apply_precision(given: Any, provider: Any) -> None:
    """Everything of the model that `given` says. Raises `ConfigError` where this machine cannot compute so."""
    record = precision_record(given)
    set_dtype(record, provider)
    if record.autocast_enabled:
        if not has_cuda():
            raise ConfigError(
                "mixed_precision.autocast_enabled needs a GPU, which this machine lacks: set it to false, and "
                "mixed_precision.bf16=true to compute in bf16"
            )
        provider.enable_autocast = True
        provider.autocast_dtype = getattr(torch, record.autocast_dtype) if record.autocast_dtype else None
    if record.fp8 is None and record.fp4 is None:
        return
    if not has_transformer_engine():
        name = given if isinstance(given, str) else f"{record.fp8 or record.fp4} (fp8 or fp4)"
        raise ConfigError(
            f"mixed_precision={name} needs a GPU and Transformer Engine, and this machine lacks them: install "
            "transformer_engine[pytorch] on a machine with GPUs, or set mixed_precision=bf16_mixed"
        )
    _apply_quantised_products(record, provider)


def _apply_quantised_products(record: MixedPrecisionConfig, provider: Any) -> None:
    for setting in FP8_SETTINGS if record.fp8 is not None else FP4_SETTINGS:
        setattr(provider, setting, getattr(record, setting))
    provider.fp8_param = record.has_fp8_params
