"""Snapshots and staging: what is packed comes out bit-equal, and what is damaged does not come out."""

from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.sync.parts import assert_same_bits, make_model, make_specs, random_bits

from weightcast.sync import HeldRegion, Manifest, Region, TensorSpec, Version
from weightcast.sync.chunks import lay_out_chunks
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.messages import CHUNK_HASH_BYTES, Announce, Offer
from weightcast.sync.snapshot import Snapshot, allocate_arena, pack_snapshot
from weightcast.sync.staging import BufferPool, SourceLayout, Staging, read_announce

CHUNK_BYTES = 4096
V1 = Version(1, 1)


def pack(tensors: dict[str, torch.Tensor], specs: list[TensorSpec] | None = None) -> tuple[Snapshot, Announce]:
    """A version of `tensors` on one source, and its announcement."""
    specs = make_specs(tensors) if specs is None else specs
    regions = tuple(spec.whole() for spec in specs)
    chunks = lay_out_chunks(regions, {spec.name: spec.dtype for spec in specs}, CHUNK_BYTES)
    held = {region: HeldRegion(region, partial(tensors.__getitem__, region.name)) for region in regions}
    by_name = {spec.name: spec for spec in specs}
    snapshot = pack_snapshot(V1, held, by_name, regions, chunks, allocate_arena(chunks))
    digests = np.array(snapshot.digests, "<u8").tobytes()
    return snapshot, Announce(V1, CHUNK_BYTES, digests, (Offer(0, "tcp://127.0.0.1:1", regions, snapshot.hashes),))


def stage(tensors: dict[str, torch.Tensor], announce: Announce) -> Staging:
    """A staging store for the announcement."""
    return Staging(*read_announce(announce, make_specs(tensors)), BufferPool())


def copy_of(snapshot: Snapshot, index: int) -> npt.NDArray[np.uint8]:
    """A chunk's bytes."""
    return np.frombuffer(snapshot.buffers[index], np.uint8).copy()


def test_what_is_packed_comes_out_bit_equal_in_any_order() -> None:
    tensors = make_model(1, rows=200)
    snapshot, announce = pack(tensors)
    staging = stage(tensors, announce)
    assert len(snapshot.chunks) > 5
    for index in reversed(range(len(snapshot.chunks))):
        staging.land(0, index, copy_of(snapshot, index))
    assert staging.checksums_checked == len(snapshot.chunks) + len(tensors)
    assert_same_bits(staging.finish(), tensors)


def test_strided_and_cast_views_are_packed_as_the_spec_says() -> None:
    wide = torch.randn(40, 30)
    live = {"t": wide.T, "cast": wide[::2, 3:9]}
    specs = [TensorSpec("t", torch.float32, (30, 40)), TensorSpec("cast", torch.bfloat16, (20, 6))]
    snapshot, announce = pack(live, specs)
    staging = Staging(*read_announce(announce, specs), BufferPool())
    for index in range(len(snapshot.chunks)):
        staging.land(0, index, copy_of(snapshot, index))
    wanted = {"t": wide.T.contiguous(), "cast": wide[::2, 3:9].to(torch.bfloat16)}
    assert_same_bits(staging.finish(), wanted)


def test_a_view_of_another_shape_is_refused() -> None:
    with pytest.raises(SourceError, match=r"live view of w\[0:4\] has the shape \(5,\)"):
        pack({"w": torch.zeros(5)}, [TensorSpec("w", torch.float32, (4,))])


def test_duplicates_are_harmless_and_missing_chunks_are_not() -> None:
    tensors = make_model(2, rows=200)
    snapshot, announce = pack(tensors)
    staging = stage(tensors, announce)
    for index in range(len(snapshot.chunks) - 1):
        staging.land(0, index, copy_of(snapshot, index))
        staging.land(0, index, np.zeros(3, np.uint8))
    assert staging.num_missing == 1
    with pytest.raises(SourceError, match=f"1 chunks are missing, the first is chunk {len(snapshot.chunks) - 1}"):
        staging.finish()
    staging.land(0, len(snapshot.chunks) - 1, copy_of(snapshot, -1))
    assert_same_bits(staging.finish(), tensors)


@pytest.mark.parametrize("damage", ["cut", "longer", "bit"])
def test_a_damaged_chunk_is_not_used_and_its_repeat_is(damage: str) -> None:
    tensors = make_model(3)
    snapshot, announce = pack(tensors)
    staging = stage(tensors, announce)
    bad = copy_of(snapshot, 0)
    if damage == "bit":
        bad[17] ^= 4
    bad = bad[:-1] if damage == "cut" else np.append(bad, np.uint8(0)) if damage == "longer" else bad
    with pytest.raises(WireError, match=r"chunk 0 of version 1 .* source rank 0 \(embed.weight"):
        staging.land(0, 0, bad)
    assert staging.is_missing(0, 0)
    for index in range(len(snapshot.chunks)):
        staging.land(0, index, copy_of(snapshot, index))
    assert_same_bits(staging.finish(), tensors)


def test_a_tensor_with_another_digest_is_refused_by_name() -> None:
    tensors = make_model(4)
    snapshot, announce = pack(tensors)
    digests = np.frombuffer(announce.digests, "<u8").copy()
    digests[1] ^= 1
    staging = stage(tensors, replace(announce, digests=digests.tobytes()))
    with pytest.raises(WireError, match=r"tensor 'layer.0.weight' of version 1 \(epoch 1\) has the digest"):
        for index in range(len(snapshot.chunks)):
            staging.land(0, index, copy_of(snapshot, index))


OFFER = Offer(0, "tcp://127.0.0.1:1", (Region("w", (0,), (8,)),), b"\0" * CHUNK_HASH_BYTES)
GOOD = Announce(V1, CHUNK_BYTES, b"\0" * 8, (OFFER,))


@pytest.mark.parametrize(
    ("announce", "match"),
    [
        (replace(GOOD, digests=b"\0" * 16), "2 digests for 1 tensors"),
        (replace(GOOD, chunk_bytes=17), "multiple of 16"),
        (replace(GOOD, chunk_bytes=0), "multiple of 16"),
        (replace(GOOD, offers=()), "incomplete: w: 0 of 8"),
        (replace(GOOD, offers=(OFFER, OFFER)), "twice"),
        (replace(GOOD, offers=(OFFER, replace(OFFER, rank=1))), "overlaps"),
        (replace(GOOD, offers=(replace(OFFER, hashes=b""),)), "too many for its 0 chunks"),
        (replace(GOOD, offers=(replace(OFFER, hashes=b"\0" * 32),)), "2 hashes for 1 chunks"),
        (replace(GOOD, offers=(replace(OFFER, hashes=b"\0" * 17),)), "hashes for 1 chunks"),
        (replace(GOOD, offers=(replace(OFFER, regions=(Region("z", (0,), (8,)),)),)), "no tensor"),
        (replace(GOOD, offers=(replace(OFFER, regions=(Region("w", (0, 0), (8,)),)),)), "dimensions"),
        (replace(GOOD, offers=(replace(OFFER, regions=(Region("w", (4,), (8,)),)),)), "outside"),
    ],
)
def test_an_announcement_that_contradicts_itself_is_refused(announce: Announce, match: str) -> None:
    specs = [TensorSpec("w", torch.int8, (8,))]
    read_announce(GOOD, specs)
    with pytest.raises(WireError, match=match):
        read_announce(announce, specs)


def test_an_astronomical_model_is_refused_before_it_is_laid_out() -> None:
    shape = (1 << 48,) * 8
    offer = replace(OFFER, regions=(Region("w", (0,) * 8, shape),))
    with pytest.raises(WireError, match="too many for its 1 chunks"):
        read_announce(replace(GOOD, offers=(offer,)), [TensorSpec("w", torch.int8, shape)])


def test_a_name_twice_is_refused() -> None:
    spec = TensorSpec("w", torch.int8, (8,))
    with pytest.raises(WireError, match="twice"):
        read_announce(replace(GOOD, digests=b"\0" * 16), [spec, spec])


def test_the_pool_reuses_memory_that_nobody_holds() -> None:
    pool, spec = BufferPool(), TensorSpec("w", torch.float32, (1000,))
    first = pool.take(spec)
    place = first.data_ptr()
    del first
    assert pool.take(spec).data_ptr() == place
    other_shape = pool.take(TensorSpec("w", torch.int16, (20, 100)))
    assert other_shape.data_ptr() == place


@pytest.mark.parametrize("hold", ["tensor", "view", "numpy", "storage", "other dtype", "parameter"])
def test_the_pool_never_reuses_memory_that_somebody_holds(hold: str) -> None:
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
    again = pool.take(spec).fill_(9)
    assert again.data_ptr() != place
    del again
    third = pool.take(spec)
    assert third.data_ptr() != place and holder is not None


def test_a_manifest_without_bytes_is_complete_at_once() -> None:
    spec = TensorSpec("none", torch.bfloat16, (0, 4))
    layout = SourceLayout(0, "tcp://127.0.0.1:1", (), b"")
    staging = Staging(Manifest(V1, (spec,), (0,)), [layout], BufferPool())
    assert list(staging.finish()) == ["none"]
    with pytest.raises(WireError, match="'none'"):
        Staging(Manifest(V1, (spec,), (5,)), [layout], BufferPool())


def test_the_snapshot_stays_when_the_trainer_goes_on() -> None:
    tensors = {"w": random_bits(torch.float32, (100,), 5)}
    before = {"w": tensors["w"].clone()}
    snapshot, announce = pack(tensors)
    tensors["w"].zero_()
    staging = stage(before, announce)
    staging.land(0, 0, copy_of(snapshot, 0))
    assert_same_bits(staging.finish(), before)
    assert snapshot.buffers[0].readonly
