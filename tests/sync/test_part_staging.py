"""Some boxes of a model, staged: what is kept, and that all of it is checked, by chunks and without sockets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sync.packed import make_packed
from tests.sync.part_staging_parts import (
    DTYPES,
    WANTED,
    assert_kept,
    change,
    make_tensors,
    open_staging,
    plan_of,
    send,
)
from tests.sync.parts import TensorSource, bits, random_bits

from weightcast.sync import Region, TensorSpec
from weightcast.sync.cut_source import cut_source
from weightcast.sync.errors import ModelMismatch
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.packer import PackMode
from weightcast.sync.shadow import Shadow
from weightcast.sync.wanted import WantedRegions, cut_for, merge_boxes


@pytest.mark.parametrize("mode", ["off", "on", "zstd"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_receiver_keeps_its_boxes_version_after_version(mode: PackMode, device: str | None) -> None:
    tensors = make_tensors(1)
    packed, shadow = make_packed(tensors), Shadow(device=None if device is None else torch.device(device))
    plan = plan_of(packed, WANTED)
    for number in range(1, 5):
        if number != 3:  # that one is as the one before
            change(tensors, number)
        snapshot = packed.pack(number, mode)
        found, encodings = send(packed, snapshot, plan, shadow)
        assert_kept(found, WANTED, tensors)
        del found
        kinds = {"off": "dense", "on": "delta", "zstd": "zdelta"}
        expected = "dense" if number == 1 else "same" if mode != "off" and number == 3 else kinds[mode]
        cut = {index for _, index in plan.cut}
        assert {encoding for index, encoding in encodings.items() if index not in cut} == {expected}
        # Of cut chunks the rest is kept once the sources are seen to send what changed: not before the second version.
        of_cut = {encoding for index, encoding in encodings.items() if index in cut}
        assert of_cut == {"dense"} if number < 3 else of_cut <= {"dense", expected} if number == 3 else {expected}
    assert bool(shadow.rests) == (mode != "off")
    rest_bytes = sum(rest.numel() * rest.element_size() for rests in shadow.rests.values() for rest in rests)
    assert plan.kept_bytes + rest_bytes <= plan.asked_bytes


def test_only_wanted_chunks_are_asked_for_and_only_boxes_take_memory() -> None:
    tensors = make_tensors(2)
    packed = make_packed(tensors)
    plan = plan_of(packed, WANTED)
    layout = packed.layouts[0]
    asked = set(plan.order[0])
    for chunk in layout.chunks:
        names = {piece.region.name for piece in chunk.pieces}
        if names == {"unused"}:
            assert chunk.index not in asked
    assert plan.asked_bytes == sum(layout.chunks[index].num_bytes for index in asked) < layout.start_bytes[-1]
    assert plan.kept_bytes == sum(spec.num_bytes for spec in plan.kept_specs)
    staging = open_staging(packed, packed.pack(1), plan, Shadow())
    assert staging.asked_bytes == plan.asked_bytes


def test_of_a_chunk_that_is_read_only_kept_pieces_are_touched() -> None:
    tensors = {name: random_bits(torch.uint8, (512,), seed) for seed, name in enumerate("abcdef")}
    packed = make_packed(tensors)
    wanted = {name: (spec.whole(),) if name in "bce" else () for name, spec in ((s.name, s) for s in packed.specs)}
    plan = plan_of(packed, wanted)
    assert plan.order[0] == [0] and plan.spans((0, 0)) == [(512, 1536), (2048, 2560)]
    snapshot = packed.pack(1)
    staging = open_staging(packed, snapshot, plan, Shadow())
    body = np.full(packed.layouts[0].chunks[0].num_bytes, 0xEE, np.uint8)
    for start, end in staging.find_spans(0, 0):
        body[start:end] = snapshot.states[0].bits[start:end]
    staging.land(0, ChunkHeader(snapshot.version, 0, "dense", None, b""), body, is_hashed=False)
    staging.seal(packed.digests())
    assert staging.num_bytes == 1536 and staging.late_keys == ()
    assert_kept(staging.finish(), wanted, tensors)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[TensorSpec], WantedRegions, list[Region]]:
    """Tensors, boxes that are wanted of them, and the regions in which a source has them."""
    specs: list[TensorSpec] = []
    wanted: dict[str, tuple[Region, ...]] = {}
    regions: list[Region] = []
    for number in range(draw(st.integers(1, 3))):
        name = f"t{number}"
        shape = tuple(draw(st.lists(st.integers(1, 40), min_size=0, max_size=3)))
        spec = TensorSpec(name, draw(st.sampled_from(DTYPES)), shape)
        boxes = []
        for _ in range(draw(st.integers(0, 3))):
            offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
            boxes.append(
                Region(name, offset, tuple(draw(st.integers(1, s - o)) for s, o in zip(shape, offset, strict=True)))
            )
        specs.append(spec)
        wanted[name] = merge_boxes(boxes)
        regions += cut_for([spec.whole()], [wanted] if draw(st.booleans()) else [])
    return specs, wanted, regions


@given(models(), st.sampled_from(["off", "on", "zstd"]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_boxes_of_any_tensors(model: tuple[list[TensorSpec], WantedRegions, list[Region]], mode: PackMode) -> None:
    specs, wanted, regions = model
    tensors = {spec.name: random_bits(spec.dtype, spec.shape, seed) for seed, spec in enumerate(specs)}
    packed, shadow = make_packed(tensors, specs, regions), Shadow()
    plan = plan_of(packed, wanted)
    for number in (1, 2, 3):
        change(tensors, number)
        found, _ = send(packed, packed.pack(number, mode), plan, shadow)
        assert_kept(found, wanted, tensors)
        del found


def test_a_source_that_is_cut_at_the_boxes_sends_no_more_than_is_wanted() -> None:
    shape = (256, 96)
    tensors = {name: random_bits(torch.bfloat16, shape, seed) for seed, name in enumerate(("rows", "columns"))}
    halves: list[WantedRegions] = [
        {"rows": (Region("rows", (128 * n, 0), (128, 96)),), "columns": (Region("columns", (0, 48 * n), (256, 48)),)}
        for n in (0, 1)
    ]
    source = cut_source(TensorSource(tensors), halves)
    regions = [held.region for held in source.held()]
    assert len(regions) == 4
    for held in source.held():
        assert torch.equal(bits(held.live()), bits(tensors[held.region.name][held.region.slices]))
    packed, uncut = make_packed(tensors, regions=regions), make_packed(tensors)
    for wanted in halves:
        plan, without = plan_of(packed, wanted), plan_of(uncut, wanted)
        assert plan.asked_bytes < 1.1 * plan.kept_bytes < without.asked_bytes
        assert not plan.cut and without.cut
        shadow = Shadow()
        for number, expected in ((1, {"dense"}), (2, {"delta"})):
            change(tensors, number)
            found, encodings = send(packed, packed.pack(number), plan, shadow)
            assert_kept(found, wanted, tensors)
            assert set(encodings.values()) == expected
            del found
        packed = make_packed(tensors, regions=regions)
    with pytest.raises(ModelMismatch, match="nothing says which boxes of columns are wanted"):
        cut_source(TensorSource(tensors), [{"rows": ()}])


# What is wrong with what comes is seen
