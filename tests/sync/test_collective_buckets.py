"""Plans and headers of broadcasts, by tables and properties; nothing here touches a network."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.transports.collective_buckets import MAX_CHUNKS_A_BUCKET, check_bucket_bytes, plan_buckets
from weightcast.sync.transports.collective_header import HEADER_BYTES, Header, Kind, decode_header, encode_header
from weightcast.sync.transports.collective_roster import (
    Begin,
    Offer,
    Outcome,
    Roster,
    assign_rank_offsets,
    decode,
    encode,
)
from weightcast.sync.version import Version

CAP = 8192
V1 = Version(7, 1)


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], []),
        ([1], [(0, [0])]),
        ([CAP], [(0, [0])]),
        ([CAP, 1], [(0, [0]), (CAP, [1])]),
        ([1, CAP], [(0, [0]), (1, [1])]),
        ([4000, 4000, 192, 1, 8000], [(0, [0, 1, 2]), (8192, [3, 4])]),
        ([4000, 4000, 193], [(0, [0, 1]), (8000, [2])]),
    ],
)
def test_plans(sizes: list[int], buckets: list[tuple[int, list[int]]]) -> None:
    plan = plan_buckets(sizes, CAP)
    assert [(bucket.start_byte, [slot.index for slot in bucket.slots]) for bucket in plan.buckets] == buckets
    assert plan.num_bytes == sum(sizes) and plan.num_chunks == len(sizes)


@PROPERTY
@given(st.lists(st.integers(1, CAP), max_size=600), st.integers(CAP, 4 * CAP))
def test_buckets_hold_every_chunk_once_in_order_within_the_cap(sizes: list[int], cap: int) -> None:
    plan = plan_buckets(sizes, cap)
    assert [slot.index for bucket in plan.buckets for slot in bucket.slots] == list(range(len(sizes)))
    at = 0
    for number, bucket in enumerate(plan.buckets):
        assert bucket.index == number and bucket.start_byte == at
        assert 0 < bucket.num_bytes <= cap and len(bucket.slots) <= MAX_CHUNKS_A_BUCKET
        used = 0
        for slot in bucket.slots:
            assert (slot.start_byte, slot.num_bytes) == (used, sizes[slot.index])
            used += slot.num_bytes
        assert used == bucket.num_bytes
        at += used
    for bucket, following in zip(plan.buckets, plan.buckets[1:], strict=False):
        is_full = len(bucket.slots) == MAX_CHUNKS_A_BUCKET
        assert is_full or bucket.num_bytes + following.slots[0].num_bytes > cap, "a bucket was closed too early"
    assert plan == plan_buckets(sizes, cap)


@pytest.mark.parametrize(
    "others", [([1, 2, 4], CAP), ([2, 1, 3], CAP), ([1, 2], CAP), ([1, 2, 3], CAP + 1), ([1, 2, 3, 1], CAP)]
)
def test_other_plans_have_other_fingerprints(others: tuple[list[int], int]) -> None:
    assert plan_buckets(*others).fingerprint != plan_buckets([1, 2, 3], CAP).fingerprint


@pytest.mark.parametrize(("bucket_bytes", "chunk_bytes"), [(0, 1), (4095, 1), (CAP, CAP + 1), (5 << 30, 1)])
def test_caps_out_of_range_are_refused(bucket_bytes: int, chunk_bytes: int) -> None:
    with pytest.raises(ConfigError, match="is a good choice"):
        check_bucket_bytes(bucket_bytes, chunk_bytes)


@pytest.mark.parametrize("size", [0, -1, (64 << 20) + 1])
def test_sizes_that_no_chunk_has_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="a chunk of"):
        plan_buckets([size], 1 << 30)


U64 = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    rank=st.integers(0, (1 << 32) - 1),
    generation=U64,
    version=st.builds(Version, U64, U64),
    fingerprint=U64,
    index=U64,
    num_bytes=U64,
    hashes=st.lists(st.binary(min_size=16, max_size=16), max_size=MAX_CHUNKS_A_BUCKET).map(tuple),
)


@PROPERTY
@given(HEADERS)
def test_headers_come_back(header: Header) -> None:
    raw = encode_header(header)
    assert len(raw) == HEADER_BYTES and decode_header(raw) == header


@PROPERTY
@given(HEADERS, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_of_a_header_is_noticed(header: Header, bit: int) -> None:
    raw = bytearray(encode_header(header))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        decode_header(bytes(raw))


@PROPERTY
@given(st.binary(max_size=HEADER_BYTES))
def test_other_bytes_are_no_headers(raw: bytes) -> None:
    for candidate in (raw, raw.ljust(HEADER_BYTES, b"\0"), b"wcbucket" + raw[8:].ljust(HEADER_BYTES - 8, b"\1")):
        with pytest.raises(WireError):
            decode_header(candidate)


def test_a_header_with_a_hash_of_its_own_is_still_checked() -> None:
    import xxhash

    good = bytearray(encode_header(Header(Kind.BUCKET, 0, 1, V1, 2, 3, 4, (bytes(16),))))
    for start, value, fault in ((8, 9, "form 9"), (10, 9, "kind 9"), (64, 255, "255 hashes"), (2000, 1, "bytes after")):
        raw = good.copy()
        raw[start] = value
        raw[-8:] = np.array(xxhash.xxh3_64_intdigest(bytes(raw[:-8])), "<u8").tobytes()
        with pytest.raises(WireError, match=fault):
            decode_header(bytes(raw))


def test_rosters() -> None:
    roster = Roster(3, (0, 2), ("a", "b", "c"))
    assert roster.names() == ("source-0", "source-2", "a", "b", "c")
    assert roster.without({"b", "source-2"}) == Roster(4, (0,), ("a", "c"))
    assert roster.next() == replace(roster, generation=4)
    for lost in ({"a", "b", "c"}, {"source-0"}):
        with pytest.raises(ConfigError, match="too few"):
            roster.without(lost)
    for wrong in (((0, 0), ("a",)), ((1, 0), ("a",)), ((0,), ("a", "a")), ((0,), ("source-0",))):
        with pytest.raises(ConfigError, match="name each once"):
            Roster(1, *wrong)


def test_engines_with_several_workers_get_ranks_one_after_the_other() -> None:
    assert assign_rank_offsets({"a": 2, "b": 1, "c": 4}) == ({"a": 1, "b": 3, "c": 4}, 8)
    assert assign_rank_offsets({"a": 1}, first_rank=3) == ({"a": 3}, 4)
    with pytest.raises(ConfigError, match="'b' has 0 workers"):
        assign_rank_offsets({"a": 1, "b": 0})
    with pytest.raises(ConfigError, match="no engine"):
        assign_rank_offsets({})


def test_messages_come_back_and_others_are_refused() -> None:
    offer = Offer(1, 2, 3, "model", 4096, 4096, (), ())
    for message in (Roster(1, (0,), ("a",)), offer, Outcome("a", 1, 0.5, ""), Begin(V1)):
        assert decode(encode(message), type(message)) == message
        with pytest.raises(WireError):
            decode(encode(message)[:-1], type(message))
    with pytest.raises(WireError, match="a Begin was expected, got a Outcome"):
        decode(encode(Outcome("a", 1, 0.5, "")), Begin)
    twice = encode(Roster(1, (0,), ("a", "b"))).replace(b"\xa1b", b"\xa1a")
    with pytest.raises(WireError, match="twice"):
        decode(twice, Roster)
