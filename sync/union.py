"""What several workers of a host want together: their boxes united, each element once. Pure.

    union = unite_wanted(specs, [wanted_of_one, wanted_of_another])    # None: all of the model
    for part in find_shares(box, union[box.name]): ...                 # where a worker's box lies in it
    carried = list_carried(layouts, plan_of_one_union, plan_of_the_next)

The union depends on which elements are wanted, and on nothing else: not on who wants them, in which order, or how
their boxes are cut. So two unions are the same exactly when they are equal, and boxes that lie side by side are one.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

from weightcast.sync.layout import SourceLayout
from weightcast.sync.ledger import ChunkKey
from weightcast.sync.part_plan import KeptPiece, PartPlan
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.shadow import Carried
from weightcast.sync.wanted import WantedRegions, intersect, whole

_Spans: TypeAlias = tuple[tuple[int, int], ...]


def unite_wanted(specs: Sequence[TensorSpec], wants: Iterable[WantedRegions | None]) -> WantedRegions | None:
    """The boxes that cover what any of `wants` does, disjoint, in one form for each set of elements.

    None, among `wants` and as the result, is all of the model. Tensors without elements are always wanted.
    """
    wants = tuple(wants)
    if any(wanted is None for wanted in wants):
        return None
    united = {
        spec.name: unite_boxes(box for wanted in wants if wanted is not None for box in wanted.get(spec.name, ()))
        if spec.numel
        else (spec.whole(),)
        for spec in specs
    }
    return None if united == whole(specs) else united


def unite_boxes(boxes: Iterable[Region]) -> tuple[Region, ...]:
    """Boxes of one tensor as disjoint ones that cover the same elements, whatever their order and cuts.

    They are slabs: as long as can be along the first dimension, then along the second, and so on.
    """
    distinct = {box for box in boxes if box.numel}
    if not distinct:
        return ()
    name = next(iter(distinct)).name
    spans = {tuple((o, o + s) for o, s in zip(box.offset, box.shape, strict=True)) for box in distinct}
    return tuple(
        Region(name, tuple(start for start, _ in slab), tuple(end - start for start, end in slab))
        for slab in _unite(tuple(spans))
    )


def _unite(boxes: Sequence[_Spans]) -> tuple[_Spans, ...]:
    if len(boxes) < 2 or not boxes[0]:
        return tuple(boxes[:1])
    hull = tuple((min(start for start, _ in spans), max(end for _, end in spans)) for spans in zip(*boxes, strict=True))
    if hull in boxes:
        return (hull,)
    slabs: list[tuple[int, int, tuple[_Spans, ...]]] = []
    for start, end in pairwise(sorted({edge for box in boxes for edge in box[0]})):
        section = _unite(tuple({box[1:] for box in boxes if box[0][0] <= start and end <= box[0][1]}))
        if section and slabs and slabs[-1][1:] == (start, section):
            slabs[-1] = (slabs[-1][0], end, section)
        elif section:
            slabs.append((start, end, section))
    return tuple(((start, end), *rest) for start, end, section in slabs for rest in section)


def find_shares(box: Region, united: Iterable[Region]) -> tuple[tuple[Region, Region], ...]:
    """(what lies in it, a box of a union) for each box of a union in which some of `box` lies."""
    return tuple((common, around) for around in united if (common := intersect(box, around)) is not None)


def is_within(wanted: WantedRegions | None, union: WantedRegions | None) -> bool:
    """Whether a union has all that is wanted; None is all of the model, and no other union is."""
    if union is None or wanted is None:
        return union is None
    return all(_is_covered(box, union.get(name, ())) for name, boxes in wanted.items() for box in boxes)


def _is_covered(box: Region, disjoint: Iterable[Region]) -> bool:
    return sum(common.numel for common, _ in find_shares(box, disjoint)) == box.numel


def list_carried(layouts: Mapping[int, SourceLayout], before: PartPlan | None, after: PartPlan | None) -> Carried:
    """What is still there of chunks that were kept by one plan, when the other comes; no plan keeps everything."""
    chunks: set[ChunkKey] = set()
    rests: set[tuple[ChunkKey, int]] = set()
    for rank, layout in layouts.items():
        for index in range(len(layout.chunks)) if after is None else after.order[rank]:
            key = (rank, index)
            if before is None:
                chunks.add(key)
            elif after is None:
                kept = before.kept.get(key, ())
                if len(kept) == len(layout.chunks[index].pieces) and not any(piece.dropped for piece in kept):
                    chunks.add(key)
            elif _is_carried(before.kept.get(key, ()), after.kept[key]):
                chunks.add(key)
                dropped = {piece.number: piece.dropped for piece in before.kept[key]}
                rests |= {(key, p.number) for p in after.kept[key] if p.dropped and p.dropped == dropped[p.number]}
    return Carried(frozenset(chunks), frozenset(rests))


def _is_carried(before: Sequence[KeptPiece], after: Sequence[KeptPiece]) -> bool:
    parts = {piece.number: [part.region for part in piece.parts] for piece in before}
    return all(_is_covered(part.region, parts.get(piece.number, ())) for piece in after for part in piece.parts)
