"""A worker's own boxes, out of what was staged once for all workers of its host.

    cuts = plan_cuts(specs, wanted, union)          # once, pure
    tensors = cuts.present(staged)                  # of each version, without a copy

A box that lies in one box of the union is a view of it. One that lies in several (where workers want boxes that cross)
is put together when it is asked for. A tensor that lies in the union whole is there in full shape without a copy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from weightcast.sync.part_plan import box_key, list_boxes
from weightcast.sync.piece_views import slices_within
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.union import find_shares
from weightcast.sync.wanted import WantedRegions
from weightcast.sync.wanted_tensors import WantedTensors


@dataclass(frozen=True, slots=True)
class Share:
    """What of a worker's box lies in a box of the union: where that is in the two, and the key of what was staged."""

    in_own: tuple[slice, ...]
    in_staged: tuple[slice, ...]
    key: str


@dataclass(frozen=True, slots=True)
class Cut:
    """A worker's box, and its shares: one, unless it crosses borders of the union."""

    box: Region
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class UnionCuts:
    """See the module."""

    specs: Sequence[TensorSpec]
    boxes: Mapping[str, tuple[tuple[str, Region], ...]]
    """By HF name, the key and the place of each of the worker's boxes."""
    cuts: Mapping[str, Cut]
    around: Mapping[str, str]
    """By HF name of a tensor that lies in the union whole, the key of it."""

    def present(self, staged: Mapping[str, torch.Tensor]) -> WantedTensors:
        """What the worker takes of a version of which the boxes of the union were staged, by `box_key`."""
        return WantedTensors(
            self.specs, self.boxes, _Parts(self.cuts, staged), {name: staged[key] for name, key in self.around.items()}
        )


class _Parts(Mapping[str, torch.Tensor]):
    """A worker's boxes by key, made when they are asked for."""

    def __init__(self, cuts: Mapping[str, Cut], staged: Mapping[str, torch.Tensor]) -> None:
        self._cuts = cuts
        self._staged = staged

    def __getitem__(self, key: str) -> torch.Tensor:
        cut = self._cuts[key]
        first = self._staged[cut.shares[0].key]
        if len(cut.shares) == 1:
            return first[cut.shares[0].in_staged]
        full = torch.empty(cut.box.shape, dtype=first.dtype, device=first.device)
        for share in cut.shares:
            full[share.in_own] = self._staged[share.key][share.in_staged]
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)


def plan_cuts(specs: Sequence[TensorSpec], wanted: WantedRegions, union: WantedRegions | None) -> UnionCuts:
    """How an engine that wants `wanted` finds it in `union`, which has all of it; None is all of the model."""
    boxes = list_boxes(specs, wanted)
    cuts: dict[str, Cut] = {}
    around: dict[str, str] = {}
    for spec in specs:
        full = spec.whole()
        keys = {full: spec.name} if union is None else {box: box_key(box) for box in union[spec.name]}
        if full in keys:
            around[spec.name] = keys[full]
        for key, box in boxes[spec.name]:
            shares = find_shares(box, keys) if box.numel else ((box, full),)
            cuts[key] = Cut(
                box, tuple(Share(slices_within(part, box), slices_within(part, at), keys[at]) for part, at in shares)
            )
    return UnionCuts(specs, boxes, cuts, around)
