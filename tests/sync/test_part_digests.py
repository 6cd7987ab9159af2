"""Every byte of a chunk of which parts are kept is vouched for: by pages of digests, also where a delta came."""

import numpy as np
import pytest
import torch
from tests.sync.packed import Packed, answer, make_packed
from tests.sync.part_staging_parts import (
    WANTED,
    assert_kept,
    change,
    make_tensors,
    open_staging,
    plan_of,
    send,
)
from tests.sync.parts import make_specs, random_bits

from weightcast.sync import Region, Version
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.digest_pages import PAGE_DIGESTS, find_page, read_page, size_page, write_pages
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.part_staging import PartStaging
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.wanted import WantedRegions


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
