"""Adapted grouped linears: Transformer Engine's linears of several experts, with an adapter for each expert.

A grouped linear holds `weight0`, `weight1`, ... of the rank's experts and is given their tokens one expert after the
other (`m_splits` says how many of each). Its adapter is a list, `linear_fc1.adapter.0`, in the same order; every
expert's own is what a linear of that expert alone would have, so checkpoints, PEFT folders and merged weights are the
same for both, and adapters go from one to the other. The base runs as one grouped product, the updates expert by
expert.

    for expert in linear.adapted_weights():
        print(expert.weight.shape, expert.adapter)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from weightcast.bridges.peft.factors import LowRank, SplitLowRank
from weightcast.bridges.peft.layers import Adaptation, Adapted, AdaptedWeight, adapted_output, shard_adapter


@dataclass(frozen=True, slots=True)
class AdaptedExpert:
    """One expert of an adapted grouped linear."""

    linear: "AdaptedGroupedLinear"
    index: int
    """Among the rank's experts."""

    @property
    def weight(self) -> nn.Parameter:
        return weight_of(self.linear, self.index)

    @property
    def adapter(self) -> LowRank | SplitLowRank:
        return self.linear.adapter[self.index]  # type: ignore[return-value]

    @property
    def adaptation(self) -> Adaptation:
        return self.linear.adaptations[self.index]

    @property
    def training(self) -> bool:
        return self.linear.training

    def own_bias(self) -> torch.Tensor | None:
        """The bias that the linear adds to the expert's output itself, where it has any."""
        bias = getattr(self.linear, f"bias{self.index}", None)
        return bias if isinstance(bias, torch.Tensor) and bias.numel() else None


class AdaptedGroupedLinear(Adapted):
    """What `adapted_grouped_class` mixes into a grouped linear's class."""

    num_gemms: int
    adapter: nn.ModuleList
    adaptations: Sequence[Adaptation]

    def adapted_weights(self) -> Iterator[AdaptedWeight]:
        """Those of the rank's experts, in order."""
        return iter(self.experts())

    def experts(self) -> list[AdaptedExpert]:
        """The rank's experts, in order."""
        return [AdaptedExpert(self, index) for index in range(self.num_gemms)]

    def forward(self, x: torch.Tensor, m_splits: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        output, bias = super().forward(x, m_splits, *args, **kwargs)
        sizes = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits)
        parts = zip(self.experts(), torch.split(output, sizes), torch.split(x, sizes), strict=True)
        adapted = [
            adapted_output(expert, own, seen, None if bias is not None else expert.own_bias())
            for expert, own, seen in parts
        ]
        return torch.cat(adapted), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The linear's own tensors, and the adapters': all experts of the layer under one key, as weights are."""
        result: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        first = parallel_state.get_expert_model_parallel_rank() * self.num_gemms
        total = parallel_state.get_expert_model_parallel_world_size() * self.num_gemms
        settings = metadata or {}
        for expert in self.experts():
            key, offsets = f"{prefix}adapter.", (*sharded_offsets, (len(sharded_offsets), first + expert.index, total))
            if settings.get("singleton_local_shards", False):  # each expert under a key of its own
                key, offsets = f"{first + expert.index}.{key}", sharded_offsets
            for name, entry in shard_adapter(expert, key, offsets, settings).items():
                # Replicas are counted among the ranks that share an expert.
                entry.replica_id = (*entry.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
                result[f"{prefix}adapter.{expert.index}.{name.removeprefix(key)}"] = entry
        return result


def is_grouped(linear: nn.Module) -> bool:
    """Whether `linear` holds the weights of several experts."""
    return hasattr(linear, "num_gemms")


def weight_of(linear: nn.Module, index: int) -> nn.Parameter:
    """The weight of one of a grouped linear's experts."""
    weight: nn.Parameter = getattr(linear, f"weight{index}")
    return weight


def adapted_grouped_class(linear: type[nn.Module]) -> type[nn.Module]:
    """The class of grouped `linear` objects that have an `adapter` and `adaptations`."""
    return type(f"Adapted{linear.__name__}", (AdaptedGroupedLinear, linear), {})
