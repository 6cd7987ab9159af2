"""Checks of a provider's experts against each other and against the parallel sizes.

`check_experts` is called by `finalize()`. Megatron's own checks come after it and catch what is not listed here.
"""

import logging

from megatron.core.transformer import TransformerConfig

from weightcast.bridges.runtime import has_cuda, has_transformer_engine
from weightcast.sync.errors import ConfigError

logger = logging.getLogger(__name__)


def check_experts(config: TransformerConfig) -> None:
    """Raise ConfigError unless every rank gets as many whole experts, and every expert divides among its ranks."""
    expert_parallel = config.expert_model_parallel_size
    if not config.num_moe_experts:
        if expert_parallel > 1:
            raise ConfigError(
                f"expert_model_parallel_size={expert_parallel} needs a model with experts; num_moe_experts is "
                f"{config.num_moe_experts}; set expert_model_parallel_size=1"
            )
        return
    _divides(config, "num_moe_experts", "expert_model_parallel_size", expert_parallel)
    tensor_parallel = config.tensor_model_parallel_size
    expert_tensor_parallel = config.expert_tensor_parallel_size or tensor_parallel
    _divides(config, "moe_ffn_hidden_size", "expert_tensor_parallel_size", expert_tensor_parallel)
    if config.moe_shared_expert_intermediate_size is not None:
        name = "moe_shared_expert_intermediate_size"
        _divides(config, name, "tensor_model_parallel_size", tensor_parallel)
    if config.moe_router_topk > config.num_moe_experts:
        raise ConfigError(
            f"moe_router_topk={config.moe_router_topk} experts a token are more than num_moe_experts="
            f"{config.num_moe_experts}; lower it"
        )
    _check_layer_pattern(config)
    _check_kernels(config)


def _divides(config: TransformerConfig, name: str, by_what: str, size: int) -> None:
    value = getattr(config, name)
    if value is None or value % size != 0:
        raise ConfigError(f"{name}={value} is not a multiple of {by_what}={size}; choose a {by_what} that divides it")


def _check_layer_pattern(config: TransformerConfig) -> None:
    pattern = config.moe_layer_freq
    if isinstance(pattern, int) and pattern >= 1:
        return
    if not isinstance(pattern, list) or len(pattern) != config.num_layers or not set(pattern) <= {0, 1}:
        raise ConfigError(
            f"moe_layer_freq={pattern!r} is neither a number from 1 on nor a list of 0 (dense) and 1 (experts) for "
            f"each of the num_layers={config.num_layers} layers; set one of them"
        )


def _check_kernels(config: TransformerConfig) -> None:
    """Refuse or turn off what this machine does not have."""
    if getattr(config, "moe_use_legacy_grouped_gemm", False):  # megatron-core 0.17 and later no longer have it
        raise ConfigError(
            "moe_use_legacy_grouped_gemm=True keeps all experts in one transposed tensor, of which no region is a "
            "view; use moe_grouped_gemm=True (Transformer Engine) or neither"
        )
    if config.moe_token_dispatcher_type == "flex" and not has_cuda():
        raise ConfigError("moe_token_dispatcher_type='flex' needs CUDA; use 'alltoall'")
    if config.moe_grouped_gemm and not has_transformer_engine():
        config.moe_grouped_gemm = False
        logger.info("moe_grouped_gemm is off: it needs Transformer Engine, without which experts run one by one")
