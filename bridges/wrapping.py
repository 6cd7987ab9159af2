"""Wraps built model chunks the way Megatron's training expects them: device, 16-bit precision, data parallelism."""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe.router import TopKRouter

from weightcast.bridges.runtime import current_device, has_cuda


def wrap_chunks(
    config: TransformerConfig,
    model: list[MegatronModule],
    ddp_config: DistributedDataParallelConfig | None,
    with_ddp: bool,
) -> list[MegatronModule]:
    """Move each chunk to this rank's device and wrap it; every rank calls it.

    With fp16 or bf16 set a chunk goes into Megatron's `Float16Module`, which takes and gives fp32 at the ends of the
    pipeline. With `with_ddp` it then goes into `DistributedDataParallel`, whose buffers take over the parameters'
    memory: whoever holds a parameter keeps it, whoever holds its `data` does not. Only the first chunk's gradients are
    cut into buckets, because the others' reductions overlap with the pipeline anyway.
    """
    for chunk in model:
        if has_cuda():
            chunk.cuda(current_device())
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    wrapped: list[Any] = [_wrap_in_16_bit(config, chunk) for chunk in model] if config.fp16 or config.bf16 else model
    if not with_ddp:
        return wrapped
    ddp_config = ddp_config if ddp_config is not None else DistributedDataParallelConfig()
    return [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(wrapped)
    ]


def _wrap_in_16_bit(config: TransformerConfig, chunk: MegatronModule) -> Float16Module:
    """`chunk` in a `Float16Module`; the bias and the counts of routers stay in fp32, and the same tensors.

    Megatron turns the bias back to fp32 before it is used, but its bits are lost by then, and counts are exact in
    bf16 up to 256 only. So do the buffers of other modules that say so with `keeps_fp32_buffers` (frequencies).
    """
    keepers = [
        module
        for module in chunk.modules()
        if isinstance(module, TopKRouter) or getattr(module, "keeps_fp32_buffers", False)
    ]
    buffers = [dict(keeper._buffers) for keeper in keepers]
    wrapped = Float16Module(config, chunk)
    for keeper, kept in zip(keepers, buffers, strict=True):
        keeper._buffers.update(kept)
    return wrapped
