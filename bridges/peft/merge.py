"""Merging: the update of every adapter added to the weight beside it, in place, and taken back bit for bit.

A merged model computes without its adapters and exports, saves and streams as any other. Sums are taken in fp32 (or
in the weight's dtype where that is wider) and rounded once to the weight's dtype; what is taken back is a copy of the
bits, not a difference.

    with merged_adapters(model):
        publisher.publish(version)  # of bridge.weight_source(model)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from weightcast.bridges.peft.attach import find_state
from weightcast.bridges.peft.layers import adapted_weights, merged_weight
from weightcast.bridges.peft.state import AdapterState
from weightcast.bridges.plan import Plan, PlannedRegion
from weightcast.bridges.shards import LiveView, Model, unwrap_chunks
from weightcast.sync.errors import ConfigError


@torch.no_grad()
def merge_adapters(model: Model, *, keep_base: bool = True) -> None:
    """Add every adapter's update to its weight, in place. Every rank must call it.

    With `keep_base` the weights' own bits go to host memory (as many bytes as the adapted weights have here), for
    `unmerge_adapters`. Raises `ConfigError` when the model has no adapters or they are merged already.
    """
    state = _require_state(model)
    if state.merged:
        raise ConfigError("the adapters are merged already; a second time would count them twice")
    for linear in adapted_weights(unwrap_chunks(model)):
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        merged = merged_weight(linear, dtype)
        if keep_base:
            linear.adaptation.base = linear.weight.detach().to("cpu", copy=True)
        linear.weight.copy_(merged)
        linear.adaptation.merged = True
    state.merged, state.kept_base = True, keep_base


@torch.no_grad()
def unmerge_adapters(model: Model) -> None:
    """Give every adapted weight its own bits back. No collective.

    Raises `ConfigError` when the adapters are not merged, or were merged without keeping the base.
    """
    state = _require_state(model)
    if not state.merged or not state.kept_base:
        raise ConfigError(
            "the adapters are not merged" if not state.merged else "the base was not kept; merge with keep_base=True"
        )
    for linear in adapted_weights(unwrap_chunks(model)):
        assert linear.adaptation.base is not None
        linear.weight.copy_(linear.adaptation.base)
        linear.adaptation.base, linear.adaptation.merged = None, False
    state.merged = False


@contextmanager
def merged_adapters(model: Model) -> Iterator[None]:
    """The adapters merged inside the block, and the base's own bits after it. Every rank must enter it."""
    merge_adapters(model)
    try:
        yield
    finally:
        unmerge_adapters(model)


def require_merged(model: Model) -> None:
    """Raise `ConfigError` for a model whose adapters stand beside weights that are about to leave without them."""
    state = find_state(model)
    if state is not None:
        state.require_merged()


def show_when_merged(plan: Plan, state: AdapterState) -> Plan:
    """`plan` of the base weights, whose regions raise `ConfigError` when they are read without their adapters."""

    def guard(held: PlannedRegion) -> PlannedRegion:
        return replace(held, live=MergedView(held.live, state))

    tasks = tuple(replace(task, held=tuple(map(guard, task.held))) for task in plan.tasks)
    return replace(plan, tasks=tasks, regions=tuple(map(guard, plan.regions)))


@dataclass(frozen=True, slots=True)
class MergedView:
    """A live view of a weight beside which an adapter may stand; it shows nothing unless that is merged."""

    view: LiveView
    state: AdapterState

    def __call__(self) -> torch.Tensor:
        self.state.require_merged()
        return self.view()

    def write(self, data: torch.Tensor) -> None:
        self.view.write(data)


def _require_state(model: Model) -> AdapterState:
    state = find_state(model)
    if state is None:
        raise ConfigError("the model has no adapters; there is nothing to merge")
    return state
