"""The identity whose gradient is summed over the ranks of a group."""

from typing import Any

import torch
import torch.distributed as dist


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradient(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """`tensor` itself; its gradient is the sum of those of all ranks of `group`, which all must take part.

    Megatron's own (`copy_to_tensor_model_parallel_region`) leaves out the sum for gradients that are not contiguous.
    """
    summed: torch.Tensor = _SumGradient.apply(tensor, group)  # type: ignore[no-untyped-call]
    return summed
