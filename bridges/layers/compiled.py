"""Elementwise work in one kernel each, made by torch.compile: for GPUs without Transformer Engine.

Each is written as plain torch, which is also what it does until it is compiled; the compiler leaves out the trips to
memory between the steps, and the rounding to 16 bits that comes with them. A provider's `uses_compiled_kernels` says
whether a model has them. The first call with a shape compiles, a few seconds.

    query = compiled(rotate)(query, angles)
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def compiled(function: Function) -> Function:
    """`function` as torch.compile makes it, for its forward and its backward; the same one at every call."""
    return cast(Function, torch.compile(function))


def rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Queries or keys [s, batch, heads, d] turned by `angles` [s, 1 or batch, 1, rotated], halves against each other.

    What is rotated may be less than d; the rest stays as it is. Megatron does the same in eight steps.
    """
    size = angles.shape[-1]
    turned, kept = states[..., :size], states[..., size:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = torch.cos(angles).to(states.dtype), torch.sin(angles).to(states.dtype)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if kept.shape[-1] == 0 else torch.cat((turned, kept), dim=-1)


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each row, fp32 [rows], of logits [rows, vocabulary].

    As it stands it makes three copies of the logits in fp32, forward and backward. Compiled it keeps the logits as
    they are and two numbers a row, and goes over them four times in all.
    """
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")
