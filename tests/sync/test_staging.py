"""Packing and staging: what is packed comes out bit-equal, and what is damaged does not come out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.sync.packed import CHUNK_BYTES, Packed, answer, make_packed
from tests.sync.parts import assert_same_bits, make_model, random_bits

from weightcast.sync import HeldRegion, Region, TensorSpec, Version
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.layout import read_layout
from weightcast.sync.messages import ChunkHeader, Layout
from weightcast.sync.records import Offer
from weightcast.sync.shadow import BufferPool, Shadow
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.staging import Staging


def land_all(packed: Packed, snapshot: Snapshot, staging: Staging) -> None:
    """Every chunk that is still missing, as it was packed."""
    for index in range(len(snapshot)):
        staging.land(0, *answer(snapshot, index))


def test_what_is_packed_comes_out_bit_equal_in_any_order() -> None:
    packed = make_packed(make_model(1, rows=200))
    snapshot = packed.pack(1)
    staging = packed.stage(snapshot, Shadow())
    assert len(snapshot) > 5
    for index in reversed(range(len(snapshot))):
        staging.land(0, *answer(snapshot, index))
    assert staging.checksums_checked == len(snapshot) + len(packed.tensors)
    assert_same_bits(staging.finish(), packed.tensors)


def test_digests_may_come_last() -> None:
    packed = make_packed(make_model(1, rows=200))
    snapshot = packed.pack(1)
    staging = Staging(snapshot.version, packed.specs, packed.layouts, Shadow())
    land_all(packed, snapshot, staging)
    assert not staging.is_whole and staging.num_missing == 0
    with pytest.raises(SourceError, match="the digests are not there"):
        staging.finish()
    with pytest.raises(WireError, match=f"3 digests for {len(packed.specs)} tensors"):
        staging.seal(bytes(24))
    staging.seal(packed.digests())
    assert_same_bits(staging.finish(), packed.tensors)


def test_strided_and_cast_views_are_packed_as_the_spec_says() -> None:
    wide = torch.randn(40, 30)
    live = {"t": wide.T, "cast": wide[::2, 3:9]}
    specs = [TensorSpec("t", torch.float32, (30, 40)), TensorSpec("cast", torch.bfloat16, (20, 6))]
    packed = make_packed(live, specs)
    wanted = {"t": wide.T.contiguous(), "cast": wide[::2, 3:9].to(torch.bfloat16)}
    assert_same_bits(packed.send(packed.pack(1), Shadow())[0], wanted)


def test_a_view_of_another_shape_is_refused_and_the_next_version_is_whole() -> None:
    tensors = {"a": torch.zeros(4), "w": torch.zeros(4)}
    packed = make_packed(tensors)
    packed.pack(1)
    tensors["a"].fill_(1)
    held, region = packed.packer._held, packed.specs[1].whole()
    packed.packer._held = {**held, region: HeldRegion(region, lambda: torch.zeros(5))}
    with pytest.raises(SourceError, match=r"live view of w\[0:4\] has the shape \(5,\)"):
        packed.pack(2)
    packed.packer._held = held
    assert_same_bits(packed.send(packed.pack(3), Shadow())[0], tensors)


def test_duplicates_are_harmless_and_missing_chunks_are_not() -> None:
    packed = make_packed(make_model(2, rows=200))
    snapshot = packed.pack(1)
    staging = packed.stage(snapshot, Shadow())
    for index in range(len(snapshot) - 1):
        header, body = answer(snapshot, index)
        staging.land(0, header, body)
        staging.land(0, header, np.zeros(3, np.uint8))
    assert staging.num_missing == 1
    with pytest.raises(SourceError, match=f"1 chunks are missing, the first is chunk {len(snapshot) - 1}"):
        staging.finish()
    staging.land(0, *answer(snapshot, len(snapshot) - 1))
    assert_same_bits(staging.finish(), packed.tensors)


@pytest.mark.parametrize("damage", ["cut", "longer", "bit", "nothing"])
def test_a_damaged_chunk_is_not_used_and_its_repeat_is(damage: str) -> None:
    packed = make_packed(make_model(3))
    snapshot = packed.pack(1)
    staging = packed.stage(snapshot, Shadow())
    header, body = answer(snapshot, 0)
    assert body is not None
    bad: ByteArray | None = body.copy()
    if damage == "bit":
        body[17] ^= 4
        bad = body
    bad = {"cut": body[:-1], "longer": np.append(body, np.uint8(0)), "nothing": None}.get(damage, bad)
    with pytest.raises(WireError, match=r"chunk 0 of version 1 .* source rank 0 \(embed.weight"):
        staging.land(0, header, bad)
    assert staging.is_missing(0, 0) and staging.base(0, 0) is None
    land_all(packed, snapshot, staging)
    assert_same_bits(staging.finish(), packed.tensors)


def test_a_tensor_with_another_digest_is_named_and_fetched_again() -> None:
    packed = make_packed(make_model(4, rows=200))
    snapshot = packed.pack(1)
    digests = np.frombuffer(packed.digests(), "<u8").copy()
    digests[1] ^= 1
    staging = Staging(snapshot.version, packed.specs, packed.layouts, Shadow())
    staging.seal(digests.tobytes())
    land_all(packed, snapshot, staging)
    assert staging.take_wrong() == ["layer.0.weight"] and staging.take_wrong() == []
    assert "tensor 'layer.0.weight' of version 1 (epoch 1) has the digest" in staging.describe_wrong("layer.0.weight")
    keys = staging.reopen(["layer.0.weight"])
    assert len(keys) > 2 and staging.num_missing == len(keys)
    land_all(packed, snapshot, staging)
    assert staging.take_wrong() == ["layer.0.weight"]
    assert not staging.is_whole


def test_several_wrong_tensors_of_one_chunk_are_wanted_once() -> None:
    packed = make_packed(make_model(4, rows=200))
    snapshot = packed.pack(1)
    staging = Staging(snapshot.version, packed.specs, packed.layouts, Shadow())
    staging.seal(bytes(8 * len(packed.specs)))
    land_all(packed, snapshot, staging)
    wrong = staging.take_wrong()
    keys = [key for name in wrong for key in staging.reopen([name])]
    assert len(wrong) == len(packed.specs) - 1, "nothing is wrong with a tensor without elements"
    assert sorted(keys) == [(0, index) for index in range(len(snapshot))] and staging.num_missing == len(keys)
    land_all(packed, snapshot, staging)
    assert staging.take_wrong() == wrong


def test_what_was_read_out_of_memory_that_changed_meanwhile_is_mended() -> None:
    packed = make_packed(make_model(5, rows=200))
    snapshot = packed.pack(1)
    staging = packed.stage(snapshot, Shadow())
    header, body = answer(snapshot, 1)
    assert body is not None
    body[100:200] += 1
    body.flags.writeable = False
    staging.land(0, header, body, is_hashed=False)
    land_all(packed, snapshot, staging)
    (name,) = staging.take_wrong()
    assert (0, 1) in staging.reopen([name])
    land_all(packed, snapshot, staging)
    assert staging.take_wrong() == []
    assert_same_bits(staging.finish(), packed.tensors)


OFFER = Offer(0, "tcp://127.0.0.1:1", (Region("w", (0,), (8,)),))
GOOD = Layout(1, CHUNK_BYTES, (OFFER,))


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        (replace(GOOD, chunk_bytes=17), "multiple of 16"),
        (replace(GOOD, chunk_bytes=0), "multiple of 16"),
        (replace(GOOD, offers=()), "incomplete: w: 0 of 8"),
        (replace(GOOD, offers=(OFFER, OFFER)), "twice"),
        (replace(GOOD, offers=(OFFER, replace(OFFER, rank=1))), "overlaps"),
        (replace(GOOD, offers=(replace(OFFER, regions=(Region("z", (0,), (8,)),)),)), "no tensor"),
        (replace(GOOD, offers=(replace(OFFER, regions=(Region("w", (0, 0), (8,)),)),)), "dimensions"),
        (replace(GOOD, offers=(replace(OFFER, regions=(Region("w", (4,), (8,)),)),)), "outside"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(layout: Layout, match: str) -> None:
    specs = [TensorSpec("w", torch.int8, (8,))]
    read_layout(GOOD, specs)
    with pytest.raises(WireError, match=match):
        read_layout(layout, specs)


def test_an_astronomical_model_is_refused_before_it_is_laid_out() -> None:
    shape = (1 << 48,) * 8
    offer = replace(OFFER, regions=(Region("w", (0,) * 8, shape),))
    with pytest.raises(WireError, match="too many for the 4194304 chunks"):
        read_layout(replace(GOOD, offers=(offer,)), [TensorSpec("w", torch.int8, shape)])


def test_a_name_twice_is_refused() -> None:
    spec = TensorSpec("w", torch.int8, (8,))
    with pytest.raises(WireError, match="twice"):
        read_layout(GOOD, [spec, spec])


def test_the_pool_reuses_memory_that_nobody_holds() -> None:
    pool, spec = BufferPool(), TensorSpec("w", torch.float32, (1000,))
    first = pool.take(spec)
    place = first.data_ptr()
    del first
    assert pool.take(spec).data_ptr() == place
    other_shape = pool.take(TensorSpec("w", torch.int16, (20, 100)))
    assert other_shape.data_ptr() == place


@pytest.mark.parametrize("hold", ["tensor", "view", "numpy", "storage", "other dtype", "parameter"])
@pytest.mark.parametrize("keep_bits", [True, False])
def test_the_pool_never_reuses_memory_that_somebody_holds(hold: str, keep_bits: bool) -> None:
    pool, spec = BufferPool(), TensorSpec("w", torch.float32, (1000,))
    tensor = pool.take(spec).fill_(7)
    place = tensor.data_ptr()
    holders: dict[str, object] = {
        "tensor": tensor,
        "view": tensor[5:],
        "numpy": tensor.numpy()[3:],
        "storage": tensor.untyped_storage(),
        "other dtype": tensor.view(torch.int8)[:1],
        "parameter": torch.nn.Parameter(tensor),
    }
    holder = holders[hold]
    del tensor
    holders.clear()
    again = pool.take(spec, keep_bits=keep_bits)
    assert again.data_ptr() != place and (not keep_bits or bool((again == 7).all()))
    again.fill_(9)
    del again
    third = pool.take(spec)
    assert third.data_ptr() != place and holder is not None


def test_a_model_without_bytes_is_complete_with_its_digests() -> None:
    spec = TensorSpec("none", torch.bfloat16, (0, 4))
    packed = make_packed({"none": torch.empty(0, 4, dtype=torch.bfloat16)}, [spec])
    snapshot = packed.pack(1)
    staging = packed.stage(snapshot, Shadow())
    assert list(staging.finish()) == ["none"]
    staging = Staging(snapshot.version, packed.specs, packed.layouts, Shadow())
    staging.seal((5).to_bytes(8, "little"))
    assert staging.take_wrong() == ["none"] and not staging.is_whole


def test_the_snapshot_stays_when_the_trainer_goes_on() -> None:
    tensors = {"w": random_bits(torch.float32, (100,), 5)}
    before = {"w": tensors["w"].clone()}
    packed = make_packed(tensors)
    snapshot = packed.pack(1)
    tensors["w"].zero_()
    assert_same_bits(packed.send(snapshot, Shadow())[0], before)
    body = snapshot.body(0, None)
    assert body.data is not None and body.data.readonly


def test_headers_of_nothing_say_so() -> None:
    packed = make_packed(make_model(6))
    snapshot = packed.pack(1)
    # Beyond the last chunk lie pages of digests, of which so few pieces need one.
    assert snapshot.body(len(snapshot), None).encoding == "dense"
    assert snapshot.body(len(snapshot) + 1, None).encoding == "absent"
    assert answer(snapshot, 0, snapshot.version) == (ChunkHeader(snapshot.version, 0, "same", Version(1, 1), b""), None)
