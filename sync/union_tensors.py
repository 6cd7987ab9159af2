"""A worker's own boxes, out of what was staged once for all workers of its host.

A box that lies in one box of the union is a view of it. One that lies in several (where workers want boxes that cross)
is put together when it is asked for. A tensor that lies in the union whole is there in full shape without a copy.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from weightcast.sync.packer import slices_within
from weightcast.sync.part_plan import box_key, list_boxes
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.union import find_shares
from weightcast.sync.wanted import WantedRegions
from weightcast.sync.wanted_tensors import WantedTensors


class UnionCuts(Mapping[str, torch.Tensor]):
    """Boxes by key, each made of its shares: (what lies there, the box of the union, its contents)."""

    def __init__(self, cuts: Mapping[str, tuple[Region, Sequence[tuple[Region, Region, torch.Tensor]]]]) -> None:
        self._cuts = cuts

    def __getitem__(self, key: str) -> torch.Tensor:
        box, shares = self._cuts[key]
        first = shares[0][2]
        if len(shares) == 1:
            return first[slices_within(box, shares[0][1])]
        full = torch.empty(box.shape, dtype=first.dtype, device=first.device)
        for common, around, tensor in shares:
            full[slices_within(common, box)] = tensor[slices_within(common, around)]
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)


def cut_from_union(
    specs: Sequence[TensorSpec],
    wanted: WantedRegions,
    union: WantedRegions | None,
    staged: Mapping[str, torch.Tensor],
) -> WantedTensors:
    """What an engine that wants `wanted` takes of a version that was staged for `union`, which has all of it.

    `staged` has a tensor for each box of the union, by `box_key`; for all of the model (None) the tensors by name.
    """
    boxes = list_boxes(specs, wanted)
    cuts: dict[str, tuple[Region, Sequence[tuple[Region, Region, torch.Tensor]]]] = {}
    around: dict[str, torch.Tensor] = {}
    for spec in specs:
        united = (spec.whole(),) if union is None else union[spec.name]
        there = {box: staged[spec.name if union is None else box_key(box)] for box in united}
        if spec.whole() in there:
            around[spec.name] = there[spec.whole()]
        for key, box in boxes[spec.name]:
            shares = find_shares(box, united) if box.numel else ((box, spec.whole()),)
            cuts[key] = (box, [(common, whole_box, there[whole_box]) for common, whole_box in shares])
    return WantedTensors(specs, boxes, UnionCuts(cuts), around)
