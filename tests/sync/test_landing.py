"""Landings: whole chunks received in steps of any size have the bits and digests of chunks that came whole."""

import numpy as np
import pytest
import torch
from tests.sync.packed import Packed, answer, make_packed
from tests.sync.parts import assert_same_bits, make_model, make_specs, random_bits

from weightcast.sync import Region
from weightcast.sync.landing import STEP_BYTES, Landing
from weightcast.sync.shadow import Shadow
from weightcast.sync.staging import Staging

CHUNK_BYTES = 4 << 20


def make_large() -> Packed:
    """Pieces of every kind: cut into steps, in strides, small ones between large ones, odd ends."""
    tensors = {
        "wide": random_bits(torch.bfloat16, (1100, 2500), 1),
        "norm": random_bits(torch.bfloat16, (37,), 2),
        "cut": random_bits(torch.bfloat16, (600, 1024), 3),
        "row": random_bits(torch.uint8, (2 * STEP_BYTES + 13,), 4),
        **make_model(5),
    }
    regions = []
    for spec in make_specs(tensors):
        if spec.name == "cut":
            regions += [Region("cut", (0, 0), (600, 500)), Region("cut", (0, 500), (600, 524))]
        else:
            regions.append(spec.whole())
    return make_packed(tensors, regions=regions, chunk_bytes=CHUNK_BYTES)


@pytest.fixture(scope="module")
def large() -> Packed:
    """One for all tests, which do not change it."""
    return make_large()


def receive(landing: Landing, body: bytes, sizes: list[int]) -> None:
    """As a socket brings it: never more than there is room for, in parts of these sizes, again and again."""
    start = turn = 0
    while len(room := landing.room()):
        num_bytes = min(len(room), sizes[turn % len(sizes)], len(body) - start)
        room[:num_bytes] = body[start : start + num_bytes]
        landing.advance(num_bytes)
        start, turn = start + num_bytes, turn + 1
    assert start == len(body)


def land_all(packed: Packed, staging: Staging, number: int, sizes: list[int]) -> int:
    """Every chunk by a landing; how many."""
    snapshot = packed.pack(number, "off")
    scratch = np.full(CHUNK_BYTES, 0xA5, np.uint8)
    for index in range(len(snapshot)):
        header, body = answer(snapshot, index)
        assert body is not None
        landing = staging.open_landing(0, header, len(body), scratch)
        assert landing is not None and len(landing) == len(body)
        receive(landing, body.tobytes(), sizes)
        staging.land(0, header, landing, is_hashed=False)
    return len(snapshot)


@pytest.mark.parametrize("sizes", [[1009], [4096, 7], [1 << 16, 1], [3 << 20], [STEP_BYTES - 1, 2, 65537]], ids=str)
def test_any_steps_bring_the_same_bits_and_digests(large: Packed, sizes: list[int]) -> None:
    snapshot = large.pack(1, "off")
    staging = large.stage(snapshot, Shadow())
    num_chunks = land_all(large, staging, 1, sizes)
    assert staging.take_wrong() == [] and staging.is_whole and num_chunks > 2
    assert staging.num_bytes == sum(state.chunk.num_bytes for state in snapshot.states)
    assert_same_bits(staging.finish(), large.tensors)


def test_a_byte_that_is_wrong_is_noticed_by_its_tensor(large: Packed) -> None:
    snapshot = large.pack(1, "off")
    staging = large.stage(snapshot, Shadow())
    scratch = np.zeros(CHUNK_BYTES, np.uint8)
    for index in range(len(snapshot)):
        header, body = answer(snapshot, index)
        assert body is not None
        if index == 0:
            body[STEP_BYTES + 5] ^= 1
        landing = staging.open_landing(0, header, len(body), scratch)
        assert landing is not None
        receive(landing, body.tobytes(), [1 << 18])
        staging.land(0, header, landing, is_hashed=False)
    assert staging.take_wrong() == ["wide"] and not staging.is_whole
    keys = staging.reopen(["wide"])
    assert (0, 0) in keys
    for _, index in keys:
        header, body = answer(snapshot, index)
        staging.land(0, header, body)
    assert staging.is_whole
    assert_same_bits(staging.finish(), large.tensors)


def test_a_landing_is_for_a_whole_chunk_that_is_missing(large: Packed) -> None:
    snapshot = large.pack(1, "off")
    staging = large.stage(snapshot, Shadow())
    scratch = np.zeros(CHUNK_BYTES, np.uint8)
    header, body = answer(snapshot, 0)
    assert body is not None
    assert staging.open_landing(0, header, len(body) - 1, scratch) is None
    landing = staging.open_landing(0, header, len(body), scratch)
    assert landing is not None
    with pytest.raises(AssertionError, match="has not come whole"):
        staging.land(0, header, landing, is_hashed=False)
    receive(landing, body.tobytes(), [len(body)])
    staging.land(0, header, landing, is_hashed=False)
    assert staging.open_landing(0, header, len(body), scratch) is None, "it is here"
