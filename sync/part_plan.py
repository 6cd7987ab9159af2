"""What a receiver that keeps some boxes of a model does with each source's chunks: computed once a layout. Pure.

    plan = plan_parts(layouts, specs, wanted)
    plan.order[rank]                # chunks to ask this source for
    plan.kept[rank, index]          # what to keep of one: pieces, and where they go
    plan.kept_specs                 # a tensor for each wanted box: all that is staged
    plan.pages[rank, index]         # pages of digests to ask for, and what to take of them

What is kept is checked in full: of a tensor of which something is wanted every piece counts towards its digest, those
that are left out by the digest that their source gives (`digest_pages`). A kept piece of which the receiver drops a
part is digested whole as it comes. The result of a delta to such a piece can only be checked where the rest of it is
kept too; regions that are cut at the borders of boxes (`cut_source`) have no such pieces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.digest_pages import find_page, size_page
from weightcast.sync.host_bytes import find_run
from weightcast.sync.layout import SourceLayout
from weightcast.sync.ledger import ChunkKey
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.wanted import BoxSpec, WantedChunk, WantedRegions, plan_wanted, subtract


@dataclass(frozen=True, slots=True)
class KeptPart:
    """A box of a piece, in the tensor's coordinates, and where it lies in the tensor that is staged for its box."""

    region: Region
    key: str
    slices: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class KeptPiece:
    """A piece of which something is kept, and what is not; `number` is its place in the chunk."""

    number: int
    piece: Piece
    parts: tuple[KeptPart, ...]
    dropped: tuple[Region, ...]

    @property
    def whole(self) -> KeptPart | None:
        """Its only part, where that is all of it."""
        return self.parts[0] if len(self.parts) == 1 and not self.dropped else None


@dataclass(frozen=True, slots=True)
class Page:
    """A page of digests: its size, and which of them are counted towards which tensor."""

    num_bytes: int
    places: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class PartPlan:
    """See the module."""

    wanted: WantedRegions = field(repr=False)
    kept_specs: tuple[TensorSpec, ...] = field(repr=False)
    """A tensor for each wanted box, in HF order; their names are `box_key`s."""
    boxes: Mapping[str, tuple[tuple[str, Region], ...]] = field(repr=False)
    """By HF name, the key and the place of each."""
    order: Mapping[int, Sequence[int]] = field(repr=False)
    kept: Mapping[ChunkKey, tuple[KeptPiece, ...]] = field(repr=False)
    pages: Mapping[ChunkKey, Page] = field(repr=False)
    cut: frozenset[ChunkKey] = field(repr=False)
    """Chunks with a piece of which a part is dropped."""
    asked_bytes: int
    """Bytes of the chunks that are asked for."""
    kept_bytes: int
    """Bytes of the wanted boxes."""

    def spans(self, key: ChunkKey) -> list[tuple[int, int]]:
        """(first byte, end) of what must be read of a chunk: its kept pieces, neighbours together."""
        pieces = self.kept[key]
        spans = [(pieces[0].piece.start_byte, pieces[0].piece.start_byte + pieces[0].piece.num_bytes)]
        for before, kept in pairwise(pieces):
            start, end = kept.piece.start_byte, kept.piece.start_byte + kept.piece.num_bytes
            if kept.number == before.number + 1:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        return spans


def box_key(box: Region) -> str:
    """A name for a wanted box, which no tensor has: names from a wire hold no NUL."""
    return f"{box.name}\0{box.offset}{box.shape}"


def list_boxes(specs: Sequence[TensorSpec], wanted: WantedRegions) -> dict[str, tuple[tuple[str, Region], ...]]:
    """By HF name and in HF order, the key and the place of each wanted box that holds an element."""
    return {
        spec.name: tuple((box_key(box), box) for box in wanted.get(spec.name, ()) if box.numel or not spec.numel)
        for spec in specs
    }


def list_kept_specs(specs: Sequence[TensorSpec], wanted: WantedRegions) -> tuple[TensorSpec, ...]:
    """A tensor for each of these boxes."""
    boxes = list_boxes(specs, wanted)
    return tuple(_stage_box(spec, key, box, len(boxes[spec.name])) for spec in specs for key, box in boxes[spec.name])


def list_staged_specs(specs: tuple[TensorSpec, ...], wanted: WantedRegions | None) -> tuple[TensorSpec, ...]:
    """The same; where all is wanted the tensors themselves."""
    return specs if wanted is None else list_kept_specs(specs, wanted)


def _stage_box(spec: TensorSpec, key: str, box: Region, num_boxes: int) -> TensorSpec:
    itemsize = spec.dtype.itemsize
    start_byte = find_run(box.shape, box.offset, spec.shape, itemsize) if num_boxes == 1 and box.numel else None
    if start_byte is None:
        return TensorSpec(key, spec.dtype, box.shape)
    return BoxSpec(key, spec.dtype, box.shape, spec.num_bytes, start_byte)


def plan_parts(layouts: Mapping[int, SourceLayout], specs: Sequence[TensorSpec], wanted: WantedRegions) -> PartPlan:
    """The plan for boxes that passed `check_wanted`."""
    boxes = list_boxes(specs, wanted)
    order: dict[int, Sequence[int]] = {}
    kept: dict[ChunkKey, tuple[KeptPiece, ...]] = {}
    pages: dict[ChunkKey, Page] = {}
    asked_bytes = 0
    for rank, layout in layouts.items():
        plan = plan_wanted(layout.chunks, wanted)
        asked_bytes += plan.asked_bytes
        order[rank] = [chunk.index for chunk in plan.chunks]
        for asked in plan.chunks:
            kept[rank, asked.index] = _keep(layout.chunks[asked.index], asked)
        pages |= _list_pages(layout, boxes, kept)
    kept_specs = list_kept_specs(specs, wanted)
    kept_bytes = sum(spec.num_bytes for spec in kept_specs)
    cut = frozenset(key for key, pieces in kept.items() if not all(piece.whole for piece in pieces))
    return PartPlan(wanted, kept_specs, boxes, order, kept, pages, cut, asked_bytes, kept_bytes)


def _keep(chunk: Chunk, asked: WantedChunk) -> tuple[KeptPiece, ...]:
    found = []
    for number, parts in groupby(asked.parts, key=lambda part: part.piece):
        piece = chunk.pieces[number]
        kept, dropped = [], [piece.region]
        for part in parts:
            kept.append(KeptPart(part.region, box_key(part.box), _within(part.region, part.box)))
            dropped = [rest for left in dropped for rest in subtract(left, part.region)]
        found.append(KeptPiece(number, piece, tuple(kept), tuple(dropped)))
    return tuple(found)


def _within(region: Region, box: Region) -> tuple[slice, ...]:
    starts = (start - first for start, first in zip(region.offset, box.offset, strict=True))
    return tuple(slice(start, start + size) for start, size in zip(starts, region.shape, strict=True))


def _list_pages(
    layout: SourceLayout,
    boxes: Mapping[str, tuple[tuple[str, Region], ...]],
    kept: Mapping[ChunkKey, tuple[KeptPiece, ...]],
) -> dict[ChunkKey, Page]:
    """Pages with digests of pieces that are left out, of tensors of which something is wanted."""
    places: dict[int, list[tuple[int, str]]] = {}
    count = 0
    for chunk in layout.chunks:
        here = {piece.number for piece in kept.get((layout.rank, chunk.index), ())}
        for number, piece in enumerate(chunk.pieces):
            if number not in here and boxes[piece.region.name]:
                page, place = find_page(count)
                places.setdefault(page, []).append((place, piece.region.name))
            count += 1
    return {
        (layout.rank, len(layout.chunks) + page): Page(size_page(page, count), tuple(found))
        for page, found in places.items()
    }
