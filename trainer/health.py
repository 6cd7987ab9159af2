"""Whether a step's loss and gradients are numbers, agreed by all ranks before the weights change.

A NaN shows on one rank first: the one with the last stage, or with the part of the gradients that has it. All ranks
must decide alike, or some would wait for others that have left.

    fault = find_nan(state.model, loss)
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from weightcast.bridges.runtime import current_device


def find_nan(model: list[Any], loss: float) -> str | None:
    """What is NaN or infinite on which rank, or `None`. Every rank calls it after the backward; a collective.

    `loss` is the same on every rank. A gradient is told of by the highest rank that has one, with its coordinates; in
    fp16, where an infinite one is how the optimizer finds the scale of the loss, it is left to it.
    """
    if not torch.isfinite(torch.tensor(loss)):
        return f"the loss is {loss}"
    if get_model_config(model[0]).fp16:
        return None
    bad = torch.tensor([0 if _has_finite_gradients(model) else dist.get_rank() + 1], device=current_device())
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if not bad.item():
        return None
    rank = int(bad.item()) - 1
    return f"the loss is {loss:.4f} and a gradient on rank {rank} is NaN or infinite{_place_of(rank)}"


def _has_finite_gradients(model: list[Any]) -> bool:
    """Whether the sum over each gradient buffer is finite, as it is unless one of its numbers is not."""
    sums = [
        buffer.grad_data.sum(dtype=torch.float32)
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all().item())


def _place_of(rank: int) -> str:
    """Where that rank is in the layout, as far as this rank knows: its own place."""
    if rank != dist.get_rank():
        return ""
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    return f" (TP rank {tensor}, stage {pipeline}, DP rank {parallel_state.get_data_parallel_rank()})"
