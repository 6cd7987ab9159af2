"""Merged weights without merging: made when they are read, one linear at a time, while the model stays as it is.

A plan whose views are replaced shows what `merge_adapters` would leave in the parameters, to the last bit, and holds
no more than two merged linears at once. So a version is streamed, or a folder saved, out of a model that goes on
training with its adapters beside frozen weights.

    merged = MergedWeights(merges_of(model))
    plan = show_merged(plan, merged)
    merged.prepare()  # on every rank, after each change of the adapters; then read as often as wanted
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol

import torch

from weightcast.bridges.peft.layers import AdaptedWeight, adapted_weights, merged_norms, merged_weight
from weightcast.bridges.plan import Plan, PlannedRegion
from weightcast.bridges.shards import InterleavedView, LiveView, Model, ParameterView, unwrap_chunks
from weightcast.bridges.source import PlanSource
from weightcast.sync.errors import ConfigError

# Gate and up of a linear may lie with another weight between them in HF's order (Mixtral's w1, w2, w3).
_KEPT_WEIGHTS = 2


class Merge(Protocol):
    """How the weight is made that stands for a parameter in what leaves the model."""

    def prepare(self) -> None:
        """Whatever needs the other ranks, once after each change. Every rank calls all of its merges in one order."""
        ...

    def __call__(self) -> torch.Tensor:
        """The weight, in the parameter's shape, from what this rank has. No collective."""
        ...


class LinearMerge:
    """Of one adapted linear; what `merge_adapters` writes."""

    def __init__(self, linear: AdaptedWeight) -> None:
        self._linear = linear
        self._norms: torch.Tensor | None = None

    @torch.no_grad()
    def prepare(self) -> None:
        """Sum the norms of rows that are cut over ranks (DoRA): a value a row."""
        self._norms = merged_norms(self._linear, self._dtype)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return merged_weight(self._linear, self._dtype, self._norms)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self._linear.weight.dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class MergedParameter:
    """A box of a parameter's merged weight; read only."""

    weights: "MergedWeights"
    view: ParameterView

    def __call__(self) -> torch.Tensor:
        weight = self.weights.of(self.view.parameter)
        return weight.as_strided(self.view.shape, self.view.stride, self.view.offset)

    def write(self, data: torch.Tensor) -> None:
        raise ConfigError("merged weights are made from base and adapters, and cannot be written")


class MergedWeights:
    """The merged weights of one rank. `prepare` comes first, and again whenever the adapters have changed."""

    def __init__(self, merges: Mapping[torch.Tensor, Merge]) -> None:
        # By identity: parameters compare elementwise.
        self._merges = {id(parameter): merge for parameter, merge in merges.items()}
        self._made: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._is_prepared = False
        self._lock = Lock()  # a publisher reads in a thread of its own

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self._merges

    def prepare(self) -> None:
        """Forget what was made, and exchange what ranks must know of each other. Every rank calls it; a collective."""
        with self._lock:
            self._made.clear()
            for merge in self._merges.values():
                merge.prepare()
            self._is_prepared = True

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The merged weight that stands for `parameter`, in its dtype. Raises `ConfigError` without a `prepare`."""
        with self._lock:
            if not self._is_prepared:
                raise ConfigError("call prepare() on every rank before merged weights are read")
            key = id(parameter)
            if key not in self._made:
                while len(self._made) >= _KEPT_WEIGHTS:
                    self._made.popitem(last=False)
                self._made[key] = self._merges[key]().to(parameter.dtype).contiguous()
            return self._made[key]


def merges_of(model: Model) -> dict[torch.Tensor, Merge]:
    """The merge of each adapted weight of this rank's chunks."""
    return {linear.weight: LinearMerge(linear) for linear in adapted_weights(unwrap_chunks(model))}


def show_merged(plan: Plan, weights: MergedWeights) -> Plan:
    """`plan` of the base weights, with merged ones in place of those that have a merge."""

    def show(held: PlannedRegion) -> PlannedRegion:
        return replace(held, live=_replace_views(held.live, weights))

    tasks = tuple(replace(task, held=tuple(map(show, task.held))) for task in plan.tasks)
    return replace(plan, tasks=tasks, regions=tuple(map(show, plan.regions)))


def _replace_views(live: LiveView, weights: MergedWeights) -> LiveView:
    if isinstance(live, InterleavedView):
        return InterleavedView(tuple(_replace_views(lane, weights) for lane in live.lanes), live.axis)
    assert isinstance(live, ParameterView), live
    return MergedParameter(weights, live) if live.parameter in weights else live


class MergedSource(PlanSource):
    """A source of merged weights. After each change of the adapters every rank calls `prepare`, then publishes."""

    def __init__(self, plan: Plan, weights: MergedWeights, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(show_merged(plan, weights), dtype=dtype)
        self.prepare: Callable[[], None] = weights.prepare
