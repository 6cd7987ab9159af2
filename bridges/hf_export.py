"""Export: full HF tensors from the parts that all ranks hold, in HF order, a bounded number of bytes at a time.

Every rank must iterate to the end, in step with the others: each batch of tensors takes a broadcast from every rank
that holds a part of it. Memory on each rank is at most twice `batch_bytes` (the parcels and the tensors made of them),
or twice the largest tensor where that is more.

    for name, tensor in export_weights(plan):
        print(name, tuple(tensor.shape))
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from weightcast.bridges.exchange import broadcast_parcels, gather_holdings
from weightcast.bridges.parcels import Routes, split_batches
from weightcast.bridges.plan import Plan
from weightcast.sync.regions import TensorSpec

DEFAULT_BATCH_BYTES = 512 * 2**20


class HFWeightTuple(NamedTuple):
    """One exported tensor: `name, weight = item`."""

    param_name: str
    weight: torch.Tensor


def gather_routes(plan: Plan) -> Routes:
    """Who sends what in an export. Every rank must call it; ranks tell each other what they hold."""
    return Routes.make(plan.specs, gather_holdings(plan.specs, [held.region for held in plan.regions]))


@torch.no_grad()
def export_weights(
    plan: Plan,
    specs: Sequence[TensorSpec] | None = None,
    *,
    device: torch.device | None = None,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
) -> Iterator[HFWeightTuple]:
    """Yield the tensors `specs` (all by default) on every rank, new ones, in the dtypes of their specs.

    Every rank must iterate, with the same `specs`. They are made on `device`, by default the parameters' own.
    Raises `SourceError` when the ranks do not hold the whole model between them.
    """
    specs = plan.specs if specs is None else tuple(specs)
    routes = gather_routes(plan)
    live = {held.region: held.live for held in plan.regions}
    where = device if device is not None else _find_device(plan)
    for batch in split_batches(specs, batch_bytes):
        tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=where) for spec in batch}
        broadcast_parcels(routes.parcels(batch), live, tensors)
        for spec in batch:
            yield HFWeightTuple(spec.name, tensors.pop(spec.name))


def _find_device(plan: Plan) -> torch.device:
    return plan.regions[0].live().device if plan.regions else torch.device("cpu")
