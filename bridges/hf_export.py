"""Export: full HF tensors from the parts that all ranks hold, in HF order, a bounded number of bytes at a time.

Every rank must iterate to the end, in step with the others, also a rank that wants nothing and is given nothing: each
batch of tensors takes one message from each rank that holds a part of it to each that wants it, and a rank that stayed
away would keep the others waiting. What is in flight on a rank, beside what its caller keeps, is bounded
(`export_batches.py`).

    for name, tensor in export_weights(plan, ranks=[0]):
        print(name, tuple(tensor.shape))  # on rank 0
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from weightcast.bridges.exchange import gather_holdings, get_rank, get_world_size, join_parcels, make_buffer
from weightcast.bridges.export_batches import Batch, Place, plan_batches
from weightcast.bridges.parcels import LiveRegions, Routes
from weightcast.bridges.plan import Plan
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import Region, TensorSpec

DEFAULT_MAX_IN_FLIGHT_BYTES = 2**30


class HFWeightTuple(NamedTuple):
    """One exported tensor: `name, weight = item`."""

    param_name: str
    weight: torch.Tensor


def gather_routes(plan: Plan) -> Routes:
    """Who sends what when a folder is saved. Every rank must call it; ranks tell each other what they hold."""
    return Routes.make(plan.specs, gather_holdings(plan.specs, [held.region for held in plan.regions]))


def export_weights(
    plan: Plan,
    specs: Sequence[TensorSpec] | None = None,
    *,
    device: torch.device | None = None,
    ranks: Sequence[int] | None = None,
    max_in_flight_bytes: int = DEFAULT_MAX_IN_FLIGHT_BYTES,
    dtype: torch.dtype | None = None,
) -> Iterator[HFWeightTuple]:
    """Yield the tensors `specs` (all by default), new ones, on the ranks `ranks` (all by default), elsewhere nothing.

    Every rank must iterate, with the same arguments but `device`, where its tensors are made (by default that of the
    parameters). Floating tensors are cast to `dtype` before they travel; by default they have the dtypes of their
    specs. Raises `SourceError` when the ranks do not hold the whole model between them, `ConfigError` for a rank that
    does not exist, a limit below 64 KiB, or arguments that differ between ranks.
    """
    specs = cast_specs(plan.specs if specs is None else specs, dtype)
    receivers = check_ranks(ranks, get_world_size())
    names = {spec.name for spec in specs}
    held = [item for item in plan.regions if item.region.name in names]
    settings = f"ranks {receivers}, max_in_flight_bytes {max_in_flight_bytes}"
    holdings = gather_holdings(specs, [item.region for item in held], settings)
    live = LiveRegions(held)
    where = device if device is not None else _find_device(plan)
    tensors: dict[str, torch.Tensor] = {}
    batches = plan_batches(specs, holdings, receivers, max_in_flight_bytes)
    for _, run in groupby(batches, key=lambda batch: batch.piece_of):
        yield from _run(tuple(run), live, tensors, where)


def check_ranks(ranks: Sequence[int] | None, world_size: int) -> tuple[int, ...]:
    """`ranks`, or all of them, in order. Raises `ConfigError` for one that does not exist, and for none at all."""
    chosen = tuple(range(world_size)) if ranks is None else tuple(sorted(set(ranks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= world_size:
        raise ConfigError(
            f"ranks={ranks} names no rank, or one that does not exist; give ranks of 0 to {world_size - 1}, "
            "or None for all"
        )
    return chosen


def cast_specs(specs: Sequence[TensorSpec], dtype: torch.dtype | None) -> tuple[TensorSpec, ...]:
    """`specs` with `dtype` in place of their floating dtypes, where it is given."""
    return tuple(
        replace(spec, dtype=dtype) if dtype is not None and spec.dtype.is_floating_point else spec for spec in specs
    )


def _run(
    batches: Sequence[Batch], live: LiveRegions, tensors: dict[str, torch.Tensor], device: torch.device
) -> Iterator[HFWeightTuple]:
    """Exchange batches that share their buffer; `tensors` keeps one that is not complete, and never one that is."""
    buffer = make_buffer(batches)
    for batch in batches:
        join_parcels(batch, live, buffer)
        if get_rank() not in batch.receivers:
            continue
        places = batch.places()
        for spec in batch.specs:
            if spec.name not in tensors:
                tensors[spec.name] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            _copy_local(tensors[spec.name], batch.local.get(spec.name, ()), live)
            _copy_joined(tensors[spec.name], places[spec.name], buffer)
            if batch.completes:
                yield HFWeightTuple(spec.name, tensors.pop(spec.name))


# Not on the generators above: torch's wrapper of a generator keeps the last tensor while the next one is made.
@torch.no_grad()
def _copy_local(tensor: torch.Tensor, regions: Sequence[Region], live: LiveRegions) -> None:
    for region in regions:
        tensor[region.slices].copy_(live(region))


def _copy_joined(tensor: torch.Tensor, places: Sequence[Place], buffer: torch.Tensor) -> None:
    for place in places:
        region = place.region
        raw = buffer[place.start_bytes : place.start_bytes + region.numel * tensor.dtype.itemsize]
        tensor[region.slices].copy_(raw.view(tensor.dtype).view(region.shape))


def _find_device(plan: Plan) -> torch.device:
    return plan.regions[0].live().device if plan.regions else torch.device("cpu")
