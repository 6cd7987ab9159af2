"""Some boxes of a model, staged: what is kept, and that all of it is checked, by chunks and without sockets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sync.packed import Packed, answer, make_packed
from tests.sync.parts import TensorSource, bits, make_specs, random_bits

from weightcast.sync import Region, TensorSpec, Version
from weightcast.sync.cut_source import cut_source
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.digest_pages import PAGE_DIGESTS, find_page, read_page, size_page, write_pages
from weightcast.sync.errors import ModelMismatch, SourceError, WireError
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.packer import PackMode
from weightcast.sync.part_plan import PartPlan, plan_parts
from weightcast.sync.part_staging import PartStaging, make_part_staging
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.wanted import WantedRegions, cut_for, merge_boxes
from weightcast.sync.wanted_tensors import WantedTensors

DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.float64)
SHAPES = {"rows": (64, 96), "columns": (64, 96), "norm": (96,), "scalar": (), "none": (0, 4), "unused": (40, 40)}
# The second of two tensor-parallel workers.
WANTED: WantedRegions = {
    "rows": (Region("rows", (32, 0), (32, 96)),),
    "columns": (Region("columns", (0, 48), (64, 48)),),
    "norm": (Region("norm", (0,), (96,)),),
    "scalar": (Region("scalar", (), ()),),
    "none": (Region("none", (0, 0), (0, 4)),),
    "unused": (),
}


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    """A tensor of each shape, of random bits."""
    return {
        name: random_bits(DTYPES[number % 2], shape, seed * 10 + number)
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def change(tensors: dict[str, torch.Tensor], seed: int, share: float = 0.02) -> None:
    """Change a few elements of each tensor, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        raw = bits(tensor)
        assert raw.data_ptr() == tensor.data_ptr() or not raw.numel()
        raw[torch.rand(raw.shape, generator=generator) < share] += 1


def plan_of(packed: Packed, wanted: WantedRegions) -> PartPlan:
    """What a receiver does with the chunks of a source."""
    return plan_parts(packed.layouts, packed.specs, wanted)


def open_staging(packed: Packed, snapshot: Snapshot, plan: PartPlan, shadow: Shadow) -> PartStaging:
    """Before anything came."""
    return make_part_staging(snapshot.version, packed.specs, packed.layouts, shadow, plan)


def send(packed: Packed, snapshot: Snapshot, plan: PartPlan, shadow: Shadow) -> tuple[WantedTensors, dict[int, str]]:
    """Everything, as the receiver asks for it: what it keeps, and each chunk's encoding."""
    staging = open_staging(packed, snapshot, plan, shadow)
    encodings = {}
    for index in staging.order[0]:
        header, body = answer(snapshot, index, staging.base(0, index))
        staging.land(0, header, body)
        encodings[index] = header.encoding
    assert not staging.num_missing and not staging.is_whole
    staging.seal(packed.digests())
    assert staging.num_missing == len(plan.pages)
    for _, index in staging.late_keys:
        staging.land(0, *answer(snapshot, index))
    assert staging.take_wrong() == [] and staging.is_whole
    return staging.finish(), encodings


def assert_kept(found: WantedTensors, wanted: WantedRegions, tensors: dict[str, torch.Tensor]) -> None:
    """Just the wanted boxes, with the tensors' bits."""
    assert list(found) == list(tensors) and len(found) == len(tensors)
    for name, tensor in tensors.items():
        parts = found.parts(name)
        assert merge_boxes(box for box, _ in parts if box.numel) == merge_boxes(wanted[name] if tensor.numel() else ())
        full = found[name]
        assert full.shape == tensor.shape and full.dtype is tensor.dtype
        for box, part in parts:
            assert torch.equal(bits(part), bits(tensor[box.slices])), name
            assert torch.equal(bits(full[box.slices]), bits(tensor[box.slices])), name
    kept = sum(box.numel * tensors[name].element_size() for name, boxes in wanted.items() for box in boxes)
    assert found.num_bytes == kept


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


def land_all(packed: Packed, staging: PartStaging, snapshot: Snapshot, altered: dict[int, int]) -> list[str]:
    """Read every chunk, unhashed, with a byte altered in some; the tensors that come out wrong."""
    for index in staging.order[0]:
        raw = np.array(snapshot.states[index].bits)
        if index in altered:
            raw[altered[index]] ^= 1
        staging.land(0, ChunkHeader(snapshot.version, index, "dense", None, b""), raw, is_hashed=False)
    staging.seal(packed.digests())
    for _, index in staging.late_keys:
        staging.land(0, *answer(snapshot, index))
    return staging.take_wrong()


def test_every_byte_that_is_kept_or_cut_away_is_vouched_for() -> None:
    tensors = make_tensors(3)
    packed = make_packed(tensors)
    plan = plan_of(packed, WANTED)
    snapshot = packed.pack(1)
    for key, pieces in plan.kept.items():
        for kept in pieces:
            staging = open_staging(packed, snapshot, plan, Shadow())
            byte = kept.piece.start_byte + kept.piece.num_bytes // 2
            assert land_all(packed, staging, snapshot, {key[1]: byte}) == [kept.piece.region.name]
            assert not staging.is_whole
            with pytest.raises(SourceError, match="incomplete"):
                staging.finish()
            reopened = staging.reopen([kept.piece.region.name])
            assert key in reopened
            for _, index in reopened:
                staging.land(0, *answer(snapshot, index))
            assert staging.is_whole
            assert_kept(staging.finish(), WANTED, tensors)


def test_a_page_that_is_altered_or_short_is_not_used() -> None:
    packed = make_packed(make_tensors(4))
    plan = plan_of(packed, WANTED)
    snapshot = packed.pack(1)
    staging = open_staging(packed, snapshot, plan, Shadow())
    for index in staging.order[0]:
        staging.land(0, *answer(snapshot, index))
    staging.seal(packed.digests())
    ((_, index),) = staging.late_keys
    header, body = answer(snapshot, index)
    assert body is not None
    altered: ByteArray = body.copy()
    altered[0] ^= 1
    for wrong, message in ((altered, "does not have the hash"), (body[:-8], "bytes instead of"), (None, "0 bytes")):
        with pytest.raises(WireError, match=f"page {index} of digests of version 1 .* from source rank 0 .*{message}"):
            staging.land(0, header, wrong)
        assert staging.is_missing(0, index)
    staging.land(0, header, body)
    staging.land(0, header, altered)  # a duplicate
    assert staging.is_whole


def test_a_delta_for_a_cut_chunk_of_which_the_rest_is_not_there_is_refused() -> None:
    tensors = make_tensors(5)
    packed, shadow = make_packed(tensors), Shadow()
    plan = plan_of(packed, WANTED)
    send(packed, packed.pack(1), plan, shadow)
    change(tensors, 1)
    snapshot = packed.pack(2)
    staging = open_staging(packed, snapshot, plan, shadow)
    _, index = min(plan.cut)
    header, body = answer(snapshot, index, Version(1, 1))
    assert header.encoding == "delta"
    with pytest.raises(WireError, match=r"changes version 1 \(epoch 1\), this engine has None"):
        staging.land(0, header, body)


@pytest.mark.parametrize("starts", [(48,), (0, 48)])
def test_an_engine_that_cuts_every_chunk_takes_deltas_too(starts: tuple[int, ...]) -> None:
    tensors = {"columns": random_bits(torch.bfloat16, (64, 96), 1)}
    packed, shadow = make_packed(tensors), Shadow()
    wanted: WantedRegions = {"columns": tuple(Region("columns", (0, start), (64, 48)) for start in starts)}
    plan = plan_of(packed, wanted)
    assert len(plan.cut) == len(plan.order[0]) > 1
    for number, expected in ((1, "dense"), (2, "delta"), (3, "delta")):
        change(tensors, number)
        found, encodings = send(packed, packed.pack(number), plan, shadow)
        assert_kept(found, wanted, tensors)
        assert set(encodings.values()) == {expected}
        del found
    assert len(shadow.rests) == (len(plan.cut) if len(starts) == 1 else 0)


def test_pages_hold_every_digest() -> None:
    digests = [(1 << 64) - 1 - number for number in range(2 * PAGE_DIGESTS + 3)]
    pages = write_pages(digests)
    assert [len(page) for page in pages] == [size_page(page, len(digests)) for page in range(3)]
    read = [read_page(np.frombuffer(page, np.uint8)) for page in pages]
    for number, digest in enumerate(digests):
        page, place = find_page(number)
        assert read[page][place] == digest
    assert write_pages([]) == []


def test_a_source_with_many_pieces_is_asked_for_the_pages_that_are_needed() -> None:
    tensors = {f"t{number}": random_bits(torch.uint8, (64, 128), number) for number in range(40)}
    regions = [Region(name, (row, 0), (1, 128)) for name in tensors for row in range(64)]
    packed = make_packed(tensors, regions=regions)
    wanted: dict[str, tuple[Region, ...]] = dict.fromkeys(tensors, ())
    wanted["t0"] = (Region("t0", (0, 0), (32, 128)),)
    wanted["t39"] = (Region("t39", (32, 0), (32, 128)),)
    plan = plan_of(packed, wanted)
    num_chunks = len(packed.layouts[0].chunks)
    assert sorted(plan.pages) == [(0, num_chunks), (0, num_chunks + 4)]
    found, _ = send(packed, packed.pack(1), plan, Shadow())
    assert_kept(found, wanted, tensors)
    assert [spec.name for spec in make_specs(tensors)] == list(found)
