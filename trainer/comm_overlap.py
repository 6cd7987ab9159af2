"""The section `comm_overlap`, on a provider and in Transformer Engine; and its record, where users of Megatron-Bridge
import it. What it says of data parallelism is in `data_parallel.py`.

    from weightcast.trainer.comm_overlap import CommOverlapConfig

    apply_overlap(cfg, provider)
"""

import inspect
import logging
import os
from typing import Any

from weightcast.bridges.runtime import has_transformer_engine
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.config.comm_overlap import CommOverlapConfig, overlap_record

__all__ = ["CommOverlapConfig", "apply_overlap", "start_user_buffers", "stop_user_buffers"]

logger = logging.getLogger(__name__)

# Kernels of Transformer Engine, or schedules over its modules.
OF_TRANSFORMER_ENGINE = (
    "tp_comm_overlap",
    "defer_embedding_wgrad_compute",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
)
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def apply_overlap(config: ConfigContainer, provider: Any) -> None:
    """Everything of the model that `comm_overlap` says; null leaves the provider as it is. Before `finalize`.

    Raises `ConfigError` where this machine lacks what a field needs.
    """
    record = overlap_record(config.comm_overlap)
    asked = [name for name in OF_TRANSFORMER_ENGINE if getattr(record, name)]
    if asked and not has_transformer_engine():
        raise ConfigError(
            f"comm_overlap.{asked[0]} needs a GPU and Transformer Engine, and this machine lacks them: install "
            f"transformer_engine[pytorch] on a machine with GPUs, or set comm_overlap.{asked[0]}=false"
        )
    for name in asked:
        setattr(provider, name, True)
    if record.tp_comm_bootstrap_backend is not None:
        provider.tp_comm_bootstrap_backend = record.tp_comm_bootstrap_backend
    if record.defer_embedding_wgrad_compute:
        provider.wgrad_deferral_limit = record.wgrad_deferral_limit
    if record.batch_p2p_comm is not None:
        provider.batch_p2p_comm = record.batch_p2p_comm


def start_user_buffers(config: ConfigContainer, provider: Any) -> None:
    """Make the buffers by which tensor-parallel ranks write into each other's memory; nothing without the setting.

    Every rank calls it, once there is a process group and before the model is built; a collective. Megatron-Core leaves
    this to its caller (`_initialize_tp_communicators` of Megatron-LM). Has not run: it needs GPUs that see each other.
    """
    if not provider.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    if os.environ.get(_CONNECTIONS) != "1":
        logger.warning(
            "%s is not 1: up to Hopper, kernels may then start in an order in which little overlaps", _CONNECTIONS
        )
    known = inspect.signature(base.initialize_ub).parameters
    if "quantization_modes" in known:  # Transformer Engine 2.7 and newer
        mode = base.UserBufferQuantizationMode
        modes = [mode.FP8 if provider.fp8 else mode.NONE]
        if provider.fp8 and provider.first_last_layers_bf16:
            modes.append(mode.NONE)
        quantized: dict[str, Any] = {"quantization_modes": modes}
    else:
        quantized = {"use_fp8": bool(provider.fp8)}
    tokens = config.dataset.seq_length * config.train.micro_batch_size // provider.context_parallel_size
    base.initialize_ub(
        shape=[tokens, provider.hidden_size],
        tp_size=provider.tensor_model_parallel_size,
        ub_cfgs=dict(overlap_record(config.comm_overlap).tp_comm_overlap_cfg),
        bootstrap_backend=provider.tp_comm_bootstrap_backend,
        **quantized,
    )


def stop_user_buffers(provider: Any) -> None:
    """Let the buffers go, so that another training of this process may make its own."""
    if provider.tp_comm_overlap:
        from transformer_engine.pytorch.module import base

        base.destroy_ub()
