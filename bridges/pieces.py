"""Pieces: the HF regions that a box of a Megatron tensor is made of.

`map_shard` cuts the segments of a rule to a box, which may be a rank's shard, a chunk of a file or the whole tensor.
Nearly every piece is a region. Where HF interleaves rows of gate and up (gpt-oss), a piece is one lane of a region:
every second row of it. Gate and up rows of a rank are lanes of the same region, so `join_lanes` makes one region of
them again, however large; only lanes whose partners lie elsewhere fall apart into single rows.

    for region, parts in join_lanes((piece, shard) for piece in map_shard(segments, offset, shape)):
        print(region, len(parts))
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from weightcast.bridges.rules import Segment
from weightcast.sync.regions import Region

_Owner = TypeVar("_Owner")


@dataclass(frozen=True, slots=True)
class Lane:
    """Of a region's indices along dimension `axis`, those from `number` on in steps of `count`."""

    axis: int
    number: int
    count: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """An index for a tensor of the region's shape."""
        return (*(slice(None),) * self.axis, slice(self.number, None, self.count))


@dataclass(frozen=True, slots=True)
class Piece:
    """One HF region of a box, or a lane of one, and what it is of the box's own tensor: `tensor[index]`."""

    region: Region
    index: tuple[int | slice, ...]
    transposed: bool = False
    """`tensor[index]` has the region's last two dimensions swapped."""
    lane: Lane | None = None
    """`None` for all of the region."""

    def of_box(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the piece in the box's tensor, oriented as in HF."""
        part = tensor[self.index]
        return part.mT if self.transposed else part

    def of_region(self, data: torch.Tensor) -> torch.Tensor:
        """A view of the piece in a tensor of the region's shape."""
        return data if self.lane is None else data[self.lane.slices]

    def overlap(self, region: Region) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Where a region of the same tensor meets the piece, or None.

        Gives an index for a tensor of the region's shape and one for the piece's own, as `of_box` and `of_region`
        give it: the same elements.
        """
        theirs, ours = [], []
        boxes = (region.offset, region.shape, self.region.offset, self.region.shape)
        for axis, (their_start, their_size, start, size) in enumerate(zip(*boxes, strict=True)):
            low, high = max(their_start, start), min(their_start + their_size, start + size)
            lane = self.lane if self.lane is not None and self.lane.axis == axis else Lane(axis, 0, 1)
            first, last = (-((start + lane.number - edge) // lane.count) for edge in (low, high))
            if first >= last:
                return None
            theirs.append(slice(start + lane.number + first * lane.count - their_start, high - their_start, lane.count))
            ours.append(slice(first, last))
        return tuple(theirs), tuple(ours)


def map_shard(segments: Sequence[Segment], offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces of the box `offset`, `shape` of a global Megatron tensor, in the order of the segments.

    Rows that no segment covers (vocabulary padding) give no piece. Pure; any cut along any dimension will do.
    """
    pieces: list[Piece] = []
    for segment in segments:
        axis = 0 if segment.expert is None else 1
        if segment.expert is not None and not offset[0] <= segment.expert < offset[0] + shape[0]:
            continue
        start = max(offset[axis], segment.megatron_row)
        stop = min(offset[axis] + shape[axis], segment.megatron_row + segment.num_rows)
        if start < stop:
            pieces.append(_piece(segment, start, stop, offset, shape))
    return tuple(pieces)


def _piece(segment: Segment, start: int, stop: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
    """The piece for the Megatron rows `start` to `stop`."""
    axis = 0 if segment.expert is None else 1
    step, number = segment.hf_step, segment.hf_row % segment.hf_step
    hf_row = segment.hf_row - number + (start - segment.megatron_row) * step
    hf_offset, hf_shape = (hf_row, *offset[axis + 1 :]), ((stop - start) * step, *shape[axis + 1 :])
    row_axis = 0
    if segment.transposed:
        hf_offset, hf_shape, row_axis = hf_offset[::-1], hf_shape[::-1], len(hf_shape) - 1
    index: tuple[int | slice, ...] = (slice(start - offset[axis], stop - offset[axis]),)
    if segment.expert is not None:
        local = segment.expert - offset[0]
        index = (slice(local, local + 1) if segment.stacked else local, *index)
        if segment.stacked:
            hf_offset, hf_shape, row_axis = (segment.expert, *hf_offset), (1, *hf_shape), row_axis + 1
    lane = Lane(row_axis, number, step) if step > 1 else None
    return Piece(Region(segment.hf, hf_offset, hf_shape), index, segment.transposed, lane)


def join_lanes(
    pieces: Iterable[tuple[Piece, _Owner]],
) -> Iterator[tuple[Region, tuple[tuple[Piece, _Owner], ...]]]:
    """The regions that `pieces` make up, each with its parts: one whole piece, or all lanes in their order.

    A piece comes with whatever owns it (a shard, its view). Lanes of one region may have several owners.
    """
    lanes: dict[Region, dict[int, tuple[Piece, _Owner]]] = {}
    for piece, owner in pieces:
        if piece.lane is None:
            yield piece.region, ((piece, owner),)
        else:
            lanes.setdefault(piece.region, {})[piece.lane.number] = (piece, owner)
    for region, parts in lanes.items():
        whole = tuple(parts[number] for number in sorted(parts))
        if whole[0][0].lane is not None and len(whole) == whole[0][0].lane.count:
            yield region, whole
            continue
        for piece, owner in whole:
            yield from ((row.region, ((row, owner),)) for row in _rows(piece))


def _rows(piece: Piece) -> Iterator[Piece]:
    """A lane row by row: a region is a box without gaps."""
    assert piece.lane is not None, "a whole piece is one region"
    axis, rows = piece.lane.axis, piece.index[-1]
    assert isinstance(rows, slice), "rows come last in an index"
    for number in range(rows.stop - rows.start):
        offset, shape = list(piece.region.offset), list(piece.region.shape)
        offset[axis] += piece.lane.number + number * piece.lane.count
        shape[axis] = 1
        start = rows.start + number
        yield replace(
            piece,
            region=Region(piece.region.name, tuple(offset), tuple(shape)),
            index=(*piece.index[:-1], slice(start, start + 1)),
            lane=None,
        )
