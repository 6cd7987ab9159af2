"""Lets a model go after its training, so that a process may train several.

let_go(state.model)

Megatron (0.16.1) keeps circles that Python's collector cannot see, because nodes of autograd are part of them: DDP has
nodes with hooks that know it; layers with experts, and layers recomputed by parts, have tensors of the last
micro-batch, whose graph leads to those nodes. Its cache of rotary tables is the whole process's. Each alone keeps a
model, its optimizer and its process groups (gloo: threads that never sleep for long).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)
from weightcast.bridges.layers.rope import forget_tables

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput  # isort: skip


def let_go(model: Sequence[Any]) -> None:
    """Break the circles in the chunks of `model`, wrapped with DDP, which cannot be trained any more."""
    forget_tables()
    for chunk in model:
        chunk.grad_accs.clear()
        for holder in _holders(chunk):
            for name, value in list(vars(holder).items()):
                if isinstance(value, CheckpointWithoutOutput) or _has_graph(value):
                    setattr(holder, name, None)


def _holders(chunk: torch.nn.Module) -> Iterator[Any]:
    """What has tensors as plain attributes: modules, and what dispatches tokens to experts."""
    for module in chunk.modules():
        yield module
        if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
            yield dispatcher


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None
