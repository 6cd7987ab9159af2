"""A source that serves its regions cut at the borders of boxes that engines want.

A tensor-parallel engine keeps some columns of some matrices. Of a chunk with whole rows of such a matrix it keeps a
part: it receives the rest in vain, and must keep it too for deltas (`part_plan`). Cut at the borders
of the workers' boxes, regions make chunks of which each worker keeps all or nothing.

    source = cut_source(bridge.weight_source(model), [wanted_of_rank_0, wanted_of_rank_1])     # every rank alike
    with WeightPublisher(source, address) as publisher: ...

Columns are packed row by row, in smaller copies: a price that the trainer pays, some of it given back by what it need
not send.
"""

from collections.abc import Sequence
from functools import partial

import torch

from weightcast.sync.piece_views import slices_within
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.source import WeightSource
from weightcast.sync.wanted import WantedRegions, check_wanted, cut_for


class CutSource:
    """See `cut_source`."""

    def __init__(self, source: WeightSource, wanted: Sequence[WantedRegions]) -> None:
        self.rank = source.rank
        self.world_size = source.world_size
        self._source = source
        self._wanted = tuple(wanted)

    def specs(self) -> Sequence[TensorSpec]:
        """Those of the source."""
        return self._source.specs()

    def held(self) -> Sequence[HeldRegion]:
        """The same elements in smaller regions."""
        return [
            held if part == held.region else HeldRegion(part, partial(_view, held, part), held.is_made)
            for held in self._source.held()
            for part in cut_for([held.region], self._wanted)
        ]


def cut_source(source: WeightSource, wanted: Sequence[WantedRegions]) -> CutSource:
    """`source`, cut for receivers that want these boxes. All ranks of a publisher must give the same.

    Raises `ModelMismatch` for boxes that are not of the source's tensors.
    """
    specs = source.specs()
    for boxes in wanted:
        check_wanted(boxes, specs)
    return CutSource(source, wanted)


def _view(held: HeldRegion, part: Region) -> torch.Tensor:
    return held.live()[slices_within(part, held.region)]
