"""Sources: processes that hold regions of a model and offer them.

A trainer rank is a source; so is a plain module. A source knows the whole model by its specs and holds some of
its regions. Replicas are offered by every rank that has them: the publisher spreads the work.

    with WeightPublisher(ModuleSource(model), "tcp://127.0.0.1:5600") as publisher:
        publisher.publish(version=1)
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from weightcast.sync.regions import HeldRegion, TensorSpec


class WeightSource(Protocol):
    """What a publisher needs of a trainer rank. `Plan.weight_source` of a bridge and `ModuleSource` are such."""

    @property
    def rank(self) -> int:
        """This source's number among the sources of one model, 0 <= rank < world_size."""
        ...

    @property
    def world_size(self) -> int:
        """How many sources the model has."""
        ...

    def specs(self) -> Sequence[TensorSpec]:
        """Every HF tensor of the whole model, in HF order; the same on every rank."""
        ...

    def held(self) -> Sequence[HeldRegion]:
        """The regions that this rank holds, replicas included."""
        ...


class ModuleSource:
    """A plain `torch.nn.Module` as a source: every parameter and persistent buffer, whole, under its own name.

    `rank` and `world_size` are for data-parallel copies of one module, which share the work of serving it.
    A parameter with two names (tied embeddings) is offered under the first, as HF checkpoints do.
    """

    def __init__(self, module: torch.nn.Module, *, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self._tensors = _untied_tensors(module)

    def specs(self) -> Sequence[TensorSpec]:
        """One spec a tensor, in the order of `state_dict()`."""
        return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def held(self) -> Sequence[HeldRegion]:
        """Every tensor, whole."""
        return [
            HeldRegion(TensorSpec(name, tensor.dtype, tuple(tensor.shape)).whole(), partial(_detach, tensor))
            for name, tensor in self._tensors.items()
        ]


def _untied_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _detach(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()
