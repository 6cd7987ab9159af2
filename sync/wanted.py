"""Parts of tensors: what a receiver that keeps only some boxes must ask for, and what it can check. Pure.

A tensor-parallel engine worker keeps its own rows or columns of most tensors. Chunks are the unit of asking and are
received whole, since their hash covers all of them; of each the worker keeps the parts that lie in its boxes.

    plan = plan_wanted(chunks, wanted)
    [chunk.index for chunk in plan.chunks]     # what to ask for
    for part in plan.chunks[0].parts: ...      # what to keep of it

A source's regions that no border of a wanted box cuts through make chunks of which a worker keeps everything:
`cut_for` cuts regions so, before they are laid out (`cut_source` for a source as it is). `part_plan` goes on from here.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from weightcast.sync.chunks import Chunk
from weightcast.sync.errors import ModelMismatch
from weightcast.sync.regions import Region, TensorSpec

WantedRegions: TypeAlias = Mapping[str, tuple[Region, ...]]
"""By tensor name, the boxes that a receiver keeps; they do not overlap. A name with none is not wanted at all."""
Want: TypeAlias = WantedRegions | Callable[[Sequence[TensorSpec]], WantedRegions]
"""The boxes, or what says them once the publisher's tensors are known."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is kept of a piece."""

    piece: int
    """The piece's number in its chunk."""
    region: Region
    """The kept box, in the tensor's coordinates."""
    box: Region
    """The wanted box in which it lies."""

    def is_all_of(self, piece: Region) -> bool:
        """Whether nothing of the piece is left out."""
        return self.region == piece


@dataclass(frozen=True, slots=True)
class WantedChunk:
    """A chunk to ask for; it holds something that is kept."""

    index: int
    num_bytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class WantedPlan:
    """What to ask one source for."""

    chunks: tuple[WantedChunk, ...]
    asked_bytes: int
    """Bytes of these chunks."""
    kept_elements: int
    """Elements of all parts."""


@dataclass(frozen=True, slots=True)
class BoxSpec(TensorSpec):
    """A wanted box as a tensor that is staged.

    Where it is one run of the bytes of its tensor, it may lie in room for all of that (`room_bytes`, from `start_byte`
    on), whose other pages are never touched: then the tensor of full shape is there without a copy.
    """

    room_bytes: int
    start_byte: int


def plan_wanted(chunks: Sequence[Chunk], wanted: WantedRegions) -> WantedPlan:
    """The chunks of one source's layout that hold wanted elements, and the parts to keep.

    Tensors that `wanted` does not name are not asked for.
    """
    asked = [
        WantedChunk(chunk.index, chunk.num_bytes, parts)
        for chunk in chunks
        if (parts := tuple(_parts_of(chunk, wanted)))
    ]
    return WantedPlan(
        tuple(asked),
        sum(chunk.num_bytes for chunk in asked),
        sum(part.region.numel for chunk in asked for part in chunk.parts),
    )


def _parts_of(chunk: Chunk, wanted: WantedRegions) -> Iterable[Part]:
    for number, piece in enumerate(chunk.pieces):
        for box in wanted.get(piece.region.name, ()):
            common = intersect(piece.region, box)
            if common is not None:
                yield Part(number, common, box)


def intersect(a: Region, b: Region) -> Region | None:
    """The box that two boxes of one tensor share; None when they share no element."""
    assert a.name == b.name
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    ends = (min(p + s, q + t) for p, s, q, t in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
    return Region(a.name, offset, shape) if all(size > 0 for size in shape) else None


def subtract(box: Region, hole: Region) -> list[Region]:
    """What is left of `box` without `hole`, as boxes that do not overlap."""
    if intersect(box, hole) is None:
        return [box]
    rest: list[Region] = []
    offset, shape = list(box.offset), list(box.shape)
    for dim in range(len(shape)):
        start, end = offset[dim], offset[dim] + shape[dim]
        inner_start, inner_end = max(start, hole.offset[dim]), min(end, hole.offset[dim] + hole.shape[dim])
        for low, high in ((start, inner_start), (inner_end, end)):
            if low < high:
                rest.append(
                    Region(box.name, _with(tuple(offset), dim, low), _with(tuple(shape), dim, high - low)),
                )
        offset[dim], shape[dim] = inner_start, inner_end - inner_start
    return rest


def merge_boxes(boxes: Iterable[Region]) -> tuple[Region, ...]:
    """Boxes of one tensor that cover the same elements and do not overlap; neighbours that make a box are joined."""
    apart: list[Region] = []
    for box in sorted(set(boxes), key=lambda b: -b.numel):
        fresh = [box]
        for other in apart:
            fresh = [part for piece in fresh for part in subtract(piece, other)]
        apart += fresh
    return tuple(sorted(_join(apart)))


def _join(boxes: list[Region]) -> list[Region]:
    for dim in range(len(boxes[0].shape) if boxes else 0):
        joined: list[Region] = []
        for box in sorted(boxes, key=lambda b: (_without(b.offset, dim), _without(b.shape, dim), b.offset[dim])):
            last = joined[-1] if joined else None
            if (
                last is not None
                and _without(last.offset, dim) == _without(box.offset, dim)
                and _without(last.shape, dim) == _without(box.shape, dim)
                and last.offset[dim] + last.shape[dim] == box.offset[dim]
            ):
                joined[-1] = Region(box.name, last.offset, _with(last.shape, dim, last.shape[dim] + box.shape[dim]))
            else:
                joined.append(box)
        boxes = joined
    return boxes


def cut_for(regions: Iterable[Region], wanted: Iterable[WantedRegions]) -> tuple[Region, ...]:
    """`regions`, cut at every border of the boxes that any of several receivers keeps.

    Without it a worker that keeps some columns of every row needs a part of every chunk. Cuts in many columns make
    small strided copies, so borders are those of boxes alone, not of rows.
    """
    borders: dict[str, list[set[int]]] = {}
    for wants in wanted:
        for name, boxes in wants.items():
            for box in boxes:
                sets = borders.setdefault(name, [set() for _ in box.shape])
                for dim, (start, size) in enumerate(zip(box.offset, box.shape, strict=True)):
                    sets[dim] |= {start, start + size}
    return tuple(part for region in regions for part in _cut_at(region, borders.get(region.name, ())))


def _cut_at(region: Region, borders: Sequence[set[int]]) -> list[Region]:
    parts = [region]
    for dim, points in enumerate(borders):
        cut: list[Region] = []
        for part in parts:
            start, end = part.offset[dim], part.offset[dim] + part.shape[dim]
            edges = [start, *sorted(point for point in points if start < point < end), end]
            for low, high in pairwise(edges):
                cut.append(Region(part.name, _with(part.offset, dim, low), _with(part.shape, dim, high - low)))
        parts = cut
    return parts


def whole(specs: Iterable[TensorSpec]) -> dict[str, tuple[Region, ...]]:
    """All of every tensor: what an engine wants that cannot say."""
    return {spec.name: (spec.whole(),) for spec in specs}


def resolve_want(want: Want, specs: Sequence[TensorSpec]) -> WantedRegions:
    """The boxes that are wanted of `specs`. Raises `ModelMismatch` for some that cannot be, and when `want` fails."""
    try:
        wanted = want(specs) if callable(want) else want
    except Exception as error:
        raise ModelMismatch(f"nobody can say which boxes are wanted: {type(error).__name__}: {error}") from error
    check_wanted(wanted, specs)
    return {name: tuple(boxes) for name, boxes in wanted.items()}


def check_wanted(wanted: WantedRegions, specs: Iterable[TensorSpec]) -> None:
    """Raise `ModelMismatch` for boxes of tensors that are not offered, that reach outside, or that overlap; and for
    tensors that are offered and that `wanted` does not name."""
    shapes = {spec.name: spec.shape for spec in specs}
    if unknown := sorted(wanted.keys() - shapes.keys()):
        raise ModelMismatch(
            f"boxes of {', '.join(unknown[:5])} are wanted, which the publisher does not offer; want boxes of the "
            "tensors that it has (`want` may be a function of them)"
        )
    if unnamed := sorted(shapes.keys() - wanted.keys()):
        raise ModelMismatch(
            f"nothing says which boxes of {', '.join(unnamed[:5])} are wanted; name them, with none if none is"
        )
    for name, boxes in wanted.items():
        full = Region(name, (0,) * len(shapes[name]), shapes[name])
        for box in boxes:
            if box.name != name or len(box.shape) != len(full.shape) or (box.numel and intersect(box, full) != box):
                raise ModelMismatch(f"wanted box {box} lies outside {name} of shape {full.shape}; give boxes inside it")
        if len(boxes) > 1 and sum(box.numel for box in boxes) != sum(box.numel for box in merge_boxes(boxes)):
            raise ModelMismatch(
                f"wanted boxes of {name} overlap: {', '.join(map(str, boxes[:5]))}; `merge_boxes` makes others of them"
            )


def share_of(wanted: WantedRegions, specs: Iterable[TensorSpec]) -> float:
    """Bytes of the wanted boxes over bytes of the model, 0 to 1."""
    sizes = {spec.name: spec for spec in specs}
    kept = sum(box.numel * sizes[name].dtype.itemsize for name, boxes in wanted.items() for box in boxes)
    total = math.fsum(spec.num_bytes for spec in sizes.values())
    return kept / total if total else 0.0


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _without(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*values[:dim], *values[dim + 1 :])
