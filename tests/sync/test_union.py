"""What several workers want together: unions of boxes, what a worker takes of one, what one leaves to the next."""

import os
import random
from collections.abc import Sequence

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY, random_bits
from tests.sync.test_wanted import SHAPES, boxes_of, paint

from weightcast.sync.chunks import Chunk, lay_out_chunks
from weightcast.sync.errors import WireError
from weightcast.sync.host.box_files import open_boxes, read_boxes
from weightcast.sync.host.members import Members, ShareTerms
from weightcast.sync.layout import SourceLayout
from weightcast.sync.ledger import ChunkKey
from weightcast.sync.part_plan import PartPlan, box_key, plan_parts
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.union import is_within, list_carried, unite_boxes, unite_wanted
from weightcast.sync.union_tensors import plan_cuts
from weightcast.sync.wanted import WantedRegions, cut_for, merge_boxes, whole

BF16 = torch.bfloat16
Case = tuple[tuple[int, ...], list[list[Region]]]
# A shape, and the boxes of up to four workers.
CASES = SHAPES.flatmap(
    lambda shape: st.tuples(st.just(shape), st.lists(st.lists(boxes_of(shape), max_size=3), min_size=1, max_size=4))
)


def wants_of(boxes: Sequence[Sequence[Region]]) -> list[WantedRegions]:
    """As each worker would say them."""
    return [{"t": merge_boxes(mine)} for mine in boxes]


def union_of(
    spec: TensorSpec, wants: Sequence[WantedRegions | None]
) -> tuple[WantedRegions | None, tuple[Region, ...]]:
    """The union, and its boxes."""
    union = unite_wanted([spec], wants)
    return union, (spec.whole(),) if union is None else union["t"]


@given(CASES, st.randoms(use_true_random=False))
@PROPERTY
def test_a_union_covers_what_anybody_wants_once_whoever_says_it_how(case: Case, dice: random.Random) -> None:
    shape, wants = case
    boxes = [box for mine in wants for box in mine]
    united = unite_boxes(boxes)
    assert torch.equal(paint(shape, united), paint(shape, boxes).clamp(max=1))
    # The same elements in another order, in smaller boxes, some of them twice.
    cuts = [{"t": tuple(dice.sample(boxes, min(len(boxes), 2)))}]
    others = [*cut_for(boxes, cuts), *boxes[:1]]
    dice.shuffle(others)
    assert unite_boxes(others) == unite_boxes(united) == united
    spec = TensorSpec("t", BF16, shape)
    together = unite_wanted([spec], wants_of(wants))
    dice.shuffle(wants)
    assert unite_wanted([spec], wants_of(wants)) == together
    assert unite_wanted([spec], [together, *wants_of(wants)]) == together
    assert (together is None) == (len(united) == 1 and united[0] == spec.whole())


@given(CASES)
@PROPERTY
def test_a_worker_finds_its_own_boxes_in_the_union(case: Case) -> None:
    shape, boxes = case
    spec, wants = TensorSpec("t", BF16, shape), wants_of(boxes)
    tensor = random_bits(BF16, shape, 1).view(torch.int16)
    union, united = union_of(spec, wants)
    staged = {spec.name if union is None else box_key(box): tensor[box.slices].clone() for box in united}
    for wanted in wants:
        assert is_within(wanted, union)
        found = plan_cuts([spec], wanted, union).present(staged)
        assert found.regions == wanted and found.num_bytes == sum(2 * box.numel for box in wanted["t"])
        for box, part in found.parts("t"):
            assert torch.equal(part, tensor[box.slices])
            full = found["t"]
            assert full.shape == shape and torch.equal(full[box.slices], tensor[box.slices])
            around = [part.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in staged.values()]
            holds = [paint(shape, [box, other]).max() == 2 for other in united]
            assert any(around) == (sum(holds) == 1), "a view, unless it lies in several boxes"
        assert union is not None or found["t"] is staged["t"], "in full shape without a copy"


@given(CASES, st.data())
@PROPERTY
def test_whether_a_union_has_all_that_is_wanted(case: Case, data: st.DataObject) -> None:
    shape, boxes = case
    spec = TensorSpec("t", BF16, shape)
    union, united = union_of(spec, wants_of(boxes))
    wanted = merge_boxes(data.draw(st.lists(boxes_of(shape), max_size=3)))
    missing = paint(shape, wanted) > paint(shape, united)
    assert is_within({"t": wanted}, union) == (not missing.any())
    assert is_within(None, union) == (union is None)


def test_all_of_a_model_is_no_box_list_and_what_is_empty_is_always_there() -> None:
    specs = [TensorSpec("t", BF16, (4, 2)), TensorSpec("none", BF16, (0, 4)), TensorSpec("scalar", BF16, ())]
    rows: list[WantedRegions] = [
        {"t": (Region("t", (start, 0), (2, 2)),), "none": (), "scalar": (specs[2].whole(),)} for start in (0, 2)
    ]
    for wants in (rows, [whole(specs)], [rows[0], None]):
        assert unite_wanted(specs, wants) is None
    union = unite_wanted(specs, rows[:1])
    assert union == {**rows[0], "none": (specs[1].whole(),)}
    assert unite_wanted(specs, []) == {"t": (), "none": (specs[1].whole(),), "scalar": ()}


def paint_kept(shape: tuple[int, ...], plan: PartPlan | None, chunks: Sequence[Chunk]) -> dict[ChunkKey, torch.Tensor]:
    """By chunk of which something is kept, the elements that are."""
    if plan is None:
        return {(0, chunk.index): paint(shape, [piece.region for piece in chunk.pieces]) for chunk in chunks}
    return {
        key: paint(shape, [part.region for kept in pieces for part in kept.parts]) for key, pieces in plan.kept.items()
    }


@given(CASES, st.lists(st.integers(0, 3), min_size=2, max_size=2))
@PROPERTY
def test_just_the_chunks_of_which_nothing_new_is_kept_are_carried_over(case: Case, numbers: list[int]) -> None:
    shape, boxes = case
    spec = TensorSpec("t", BF16, shape)
    unions = [unite_wanted([spec], wants_of(boxes[: number + 1])) for number in numbers]
    chunks = lay_out_chunks(cut_for([spec.whole()], [{"t": tuple(boxes[0])}]), {"t": BF16}, 16)
    layouts = {0: SourceLayout(0, "ipc:///none", chunks, (), ())}
    before, after = (None if union is None else plan_parts(layouts, [spec], union) for union in unions)
    carried = list_carried(layouts, before, after)
    old, new = paint_kept(shape, before, chunks), paint_kept(shape, after, chunks)
    assert carried.chunks == {key for key, kept in new.items() if key in old and not (kept > old[key]).any()}
    for (rank, index), number in carried.rests:
        assert before is not None and after is not None
        (was,) = (kept.dropped for kept in before.kept[rank, index] if kept.number == number)
        (now,) = (kept.dropped for kept in after.kept[rank, index] if kept.number == number)
        assert now and torch.equal(paint(shape, was), paint(shape, now))


SPECS = (TensorSpec("a", BF16, (8,)), TensorSpec("b", BF16, (2, 3)))


def rows(start: int, size: int) -> WantedRegions:
    """Of the vector; nothing else."""
    return {"a": (Region("a", (start,), (size,)),), "b": ()}


def test_the_first_version_waits_for_those_who_may_still_come() -> None:
    members = Members(SPECS, ShareTerms(60.0, None, 2.0))
    members.join(0, rows(0, 4), 10.0)
    assert members.first_wait_s(10.0) == 2.0 and members.first_wait_s(11.5) == 0.5 and members.first_wait_s(12.0) == 0
    members.join(1, rows(4, 2), 11.0)
    assert members.first_wait_s(12.0) == 1.0, "since the last one came"
    members.join(2, None, 12.0)
    assert members.first_wait_s(12.0) == 0, "there is no more than all of the model"
    known = Members(SPECS, ShareTerms(60.0, 2, 2.0))
    known.join(0, rows(0, 4), 10.0)
    assert known.first_wait_s(10.5) == 1.5
    known.join(1, rows(4, 2), 10.5)
    assert known.first_wait_s(10.5) == 0


def test_a_union_grows_at_once_and_shrinks_when_nobody_is_on_the_way() -> None:
    members = Members(SPECS, ShareTerms(60.0, None, 2.0))
    members.join(0, rows(0, 4), 10.0)
    assert members.unite((), 10.0) == rows(0, 4)
    members.join(1, rows(4, 2), 20.0)
    assert members.unite([rows(0, 4)], 20.0) == rows(0, 6)
    members.leave(1, 30.0)
    assert members.unite([rows(0, 6)], 31.9) == rows(0, 6)
    assert members.unite([rows(0, 6)], 32.0) == rows(0, 4)
    assert members.unite([None], 31.0) is None


def test_boxes_are_handed_over_as_they_are() -> None:
    wanted = {"b": (Region("b", (0, 1), (2, 2)),), "a": (Region("a", (0,), (2,)), Region("a", (4,), (4,)))}
    with open_boxes(SPECS, wanted) as descriptor:
        assert read_boxes(descriptor, SPECS[::-1]) == wanted
        with pytest.raises(WireError, match="boxes of 2 tensors were handed over, the model has 1"):
            read_boxes(descriptor, SPECS[:1])
        with pytest.raises(WireError, match=r"wanted box b\[0:2, 1:3\] lies outside b"):
            read_boxes(descriptor, [SPECS[0], TensorSpec("b", BF16, (2, 2))])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a weightcast message"),
        (msgpack.packb({"kind": "boxes", "tensors": [[[[0], [-1]]], []]}), "an integer from 0"),
        (msgpack.packb({"kind": "boxes", "tensors": [[[[0, 0], [1]]], []]}), "that were handed over"),
        (msgpack.packb({"kind": "boxes", "tensors": [[[[0], [4]], [[3], [2]]], []]}), "boxes of a overlap"),
    ],
)
def test_what_cannot_be_boxes_is_refused(raw: bytes, message: str) -> None:
    descriptor = os.memfd_create("boxes")
    try:
        os.write(descriptor, raw)
        with pytest.raises(WireError, match=message):
            read_boxes(descriptor, SPECS)
    finally:
        os.close(descriptor)
    with open("/dev/zero", "rb") as endless, pytest.raises(WireError, match="no file of boxes"):
        read_boxes(endless.fileno(), SPECS)
