"""Boxes that a receiver keeps, and the chunks that it must ask for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.sync.chunks import Chunk, lay_out_chunks
from weightcast.sync.errors import ModelMismatch
from weightcast.sync.regions import Region, TensorSpec, find_tiling_fault
from weightcast.sync.wanted import (
    check_wanted,
    cut_for,
    intersect,
    merge_boxes,
    plan_wanted,
    share_of,
    subtract,
    whole,
)

BF16 = torch.bfloat16
ROWS, COLUMNS, NORM = (
    TensorSpec("rows", BF16, (64, 96)),
    TensorSpec("columns", BF16, (64, 96)),
    TensorSpec("n", BF16, (96,)),
)
SPECS = (ROWS, COLUMNS, NORM)
# The second of two tensor-parallel workers.
WANTED = {"rows": (Region("rows", (32, 0), (32, 96)),), "columns": (Region("columns", (0, 48), (64, 48)),), "n": ()}
CHUNK_BYTES = 4096


def lay_out(regions: list[Region] | tuple[Region, ...]) -> tuple[Chunk, ...]:
    """Chunks of bf16 regions."""
    return lay_out_chunks(regions, {spec.name: spec.dtype for spec in SPECS}, CHUNK_BYTES)


@st.composite
def boxes_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A box, not empty."""
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Region("t", offset, tuple(draw(st.integers(1, full - at)) for full, at in zip(shape, offset, strict=True)))


SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


def paint(shape: tuple[int, ...], boxes: list[Region] | tuple[Region, ...]) -> torch.Tensor:
    """How often each element is covered."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        counts[box.slices] += 1
    return counts


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes_of(shape), max_size=6))))
@PROPERTY
def test_merged_boxes_cover_the_same_elements_once(case: tuple[tuple[int, ...], list[Region]]) -> None:
    shape, boxes = case
    assert torch.equal(paint(shape, merge_boxes(boxes)), paint(shape, boxes).clamp(max=1))


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), boxes_of(shape), boxes_of(shape))))
@PROPERTY
def test_a_box_is_what_it_shares_with_another_and_what_it_does_not(
    case: tuple[tuple[int, ...], Region, Region],
) -> None:
    shape, box, other = case
    common = intersect(box, other)
    parts = subtract(box, other) + ([] if common is None else [common])
    assert torch.equal(paint(shape, parts), paint(shape, [box]))
    assert torch.equal(paint(shape, [box]) * paint(shape, [other]), paint(shape, [] if common is None else [common]))


def test_neighbours_are_joined() -> None:
    experts = [Region("t", (index, 0, 4), (1, 8, 4)) for index in (2, 3, 4)]
    assert merge_boxes(experts) == (Region("t", (2, 0, 4), (3, 8, 4)),)


def test_only_chunks_with_wanted_elements_are_asked_for() -> None:
    chunks = lay_out([spec.whole() for spec in SPECS])
    plan = plan_wanted(chunks, WANTED)
    # 21 rows of 96 bf16 fit into a chunk: rows 0-20 hold nothing, and the last chunk holds columns and the vector.
    assert [chunk.index for chunk in plan.chunks] == [c.index for c in chunks][1:]
    assert plan.asked_bytes == sum(chunk.num_bytes for chunk in chunks[1:])
    assert plan.kept_elements == 32 * 96 + 64 * 48
    for asked in plan.chunks:
        for part in asked.parts:
            piece = chunks[asked.index].pieces[part.piece]
            assert intersect(piece.region, part.region) == part.region
            assert intersect(part.box, part.region) == part.region and part.box in WANTED[part.box.name]
            assert part.is_all_of(piece.region) == (piece.region == part.region)
            assert part.box.name == "rows" or not part.is_all_of(piece.region)


def test_regions_cut_at_the_borders_of_boxes_leave_nothing_to_drop() -> None:
    first = {"rows": (Region("rows", (0, 0), (32, 96)),), "columns": (Region("columns", (0, 0), (64, 48)),), "n": ()}
    regions = cut_for([spec.whole() for spec in SPECS], [first, WANTED])
    for spec in SPECS:
        assert find_tiling_fault(spec, [region for region in regions if region.name == spec.name]) is None
    chunks = lay_out(regions)
    plan = plan_wanted(chunks, WANTED)
    for asked in plan.chunks:
        assert all(part.is_all_of(chunks[asked.index].pieces[part.piece].region) for part in asked.parts)
    # Chunks that begin with another's pieces are the only waste.
    assert plan.asked_bytes <= plan.kept_elements * 2 + 2 * CHUNK_BYTES
    assert plan_wanted(lay_out([spec.whole() for spec in SPECS]), WANTED).asked_bytes > plan.asked_bytes


@given(
    SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes_of(shape), max_size=4), st.integers(0, 3)))
)
@PROPERTY
def test_the_kept_parts_are_the_wanted_boxes_wherever_chunks_are_cut(
    case: tuple[tuple[int, ...], list[Region], int],
) -> None:
    shape, boxes, cuts = case
    spec = TensorSpec("t", BF16, shape)
    wanted = {"t": merge_boxes(boxes)}
    regions = cut_for([spec.whole()], [{"t": tuple(boxes[:cuts])}])
    chunks = lay_out_chunks(regions, {"t": BF16}, 32)
    plan = plan_wanted(chunks, wanted)
    kept = [part.region for chunk in plan.chunks for part in chunk.parts]
    assert torch.equal(paint(shape, kept), paint(shape, wanted["t"]))
    assert all(chunk.parts for chunk in plan.chunks)
    assert plan.kept_elements == sum(region.numel for region in kept)


def test_an_engine_that_cannot_say_asks_for_everything() -> None:
    chunks = lay_out([spec.whole() for spec in SPECS])
    plan = plan_wanted(chunks, whole(SPECS))
    assert [chunk.index for chunk in plan.chunks] == [chunk.index for chunk in chunks]
    for chunk, asked in zip(chunks, plan.chunks, strict=True):
        assert [part.region for part in asked.parts] == [piece.region for piece in chunk.pieces]
    assert share_of(whole(SPECS), SPECS) == 1.0
    assert math.isclose(share_of(WANTED, SPECS), (32 * 96 + 64 * 48) / (2 * 64 * 96 + 96))
    assert share_of({}, ()) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": ()}, "boxes of other are wanted, which the publisher does not offer; want boxes of the tensors"),
        ({"n": None}, "nothing says which boxes of n are wanted"),
        ({"n": (Region("n", (90,), (7,)),)}, r"n\[90:97\] lies outside n of shape \(96,\)"),
        ({"n": (Region("n", (0, 0), (7, 1)),)}, "lies outside n"),
        ({"n": (Region("rows", (0,), (7,)),)}, "lies outside n"),
        ({"n": (Region("n", (0,), (7,)), Region("n", (6,), (7,)))}, "wanted boxes of n overlap"),
    ],
)
def test_boxes_that_fit_no_tensor_are_refused(change: dict[str, tuple[Region, ...] | None], message: str) -> None:
    check_wanted(WANTED, SPECS)
    wanted = {name: boxes for name, boxes in (WANTED | change).items() if boxes is not None}
    with pytest.raises(ModelMismatch, match=message):
        check_wanted(wanted, SPECS)
