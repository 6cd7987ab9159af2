"""Chunks that are read, and not sent, are asked for in runs: every chunk once, few at first and at the end."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.packed import CHUNK_BYTES, Packed, make_packed
from tests.sync.table_runner import run_by_numpy

from weightcast.sync import Limits, device_passes, limits
from weightcast.sync.arrival import ON_DEVICE, Arrival
from weightcast.sync.chunk_reading import lands_run
from weightcast.sync.device_landing import RunLanding
from weightcast.sync.device_passes import Runner
from weightcast.sync.device_staging import DeviceStaging
from weightcast.sync.effects import Effect, Read, Request
from weightcast.sync.errors import ConfigError
from weightcast.sync.limits import size_device_run, size_run
from weightcast.sync.messages import MAX_RUN_CHUNKS, Announce, ChunkHeader
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import Snapshot

NUM_CHUNKS = 150


@pytest.fixture(scope="module")
def packed() -> Packed:
    """A source with one tensor of many chunks."""
    values = torch.arange(NUM_CHUNKS * CHUNK_BYTES, dtype=torch.int64).to(torch.uint8).view(NUM_CHUNKS, CHUNK_BYTES)
    return make_packed({"w": values})


def open_arrival(packed: Packed, snapshot: Snapshot, limits: Limits, shadow: Shadow | None = None) -> Arrival:
    """An engine that reads the source's memory."""
    staging = packed.stage(snapshot, Shadow() if shadow is None else shadow)
    announce = Announce(snapshot.version, ())
    return Arrival(announce, staging, CHUNK_BYTES, limits, 0.0, {0: "shared_memory"})


def read_all(arrival: Arrival, snapshot: Snapshot) -> list[tuple[int, int]]:
    """Answer every request with what the source would say; (first chunk, chunks) of each."""
    requests: deque[Effect] = deque(arrival.begin(0.0))
    runs = []
    while requests:
        request = requests.popleft()
        assert isinstance(request, Request) and request.message.reached
        assert len(arrival.asked_s) <= arrival.limits.under_way_chunks
        index, count = request.message.index, request.message.count
        runs.append((index, count))
        for number in range(index, index + count):
            body = snapshot.body(number, request.message.base, reached=True)
            raw = np.array(snapshot.states[number].bits) if body.encoding == "dense" else None
            header = ChunkHeader(snapshot.version, number, body.encoding, body.base, b"")
            requests += arrival.land(0, header, raw, 0.0, is_hashed=False)
    return runs


@given(limits=st.builds(Limits, credit_chunks=st.integers(1, 64), under_way_chunks=st.integers(1, 200)))
def test_every_chunk_is_asked_for_once_whatever_the_limits(packed: Packed, limits: Limits) -> None:
    snapshot = packed.pack(1, "off")
    arrival = open_arrival(packed, snapshot, limits)
    runs = read_all(arrival, snapshot)
    assert [number for index, count in runs for number in range(index, index + count)] == list(range(NUM_CHUNKS))
    assert arrival.is_staged and arrival.tensors is not None
    assert torch.equal(arrival.tensors["w"], packed.tensors["w"])
    assert arrival.num_repeats == 0


def test_runs_grow_and_shrink(packed: Packed) -> None:
    snapshot = packed.pack(1, "off")
    counts = [count for _, count in read_all(open_arrival(packed, snapshot, Limits()), snapshot)]
    assert counts[:4] == [1, 2, 4, 8] and counts[-1] == 1
    assert len(counts) < NUM_CHUNKS / 6


def test_a_run_has_one_base(packed: Packed) -> None:
    shadow = Shadow()
    first = packed.pack(1, "off")
    read_all(open_arrival(packed, first, Limits(), shadow), first)
    shadow.forget([(0, 40)])
    second = packed.pack(2, "on")
    arrival = open_arrival(packed, second, Limits(), shadow)
    runs = read_all(arrival, second)
    assert (40, 1) in runs and arrival.is_staged
    assert arrival.num_bytes == CHUNK_BYTES  # the others were the same


def test_when_memory_cannot_be_read_any_more_each_chunk_is_asked_for_alone(packed: Packed) -> None:
    snapshot = packed.pack(1, "off")
    arrival = open_arrival(packed, snapshot, Limits())
    asked = [effect.message for effect in arrival.begin(0.0) if isinstance(effect, Request)]
    num_asked = sum(message.count for message in asked)
    again = [effect.message for effect in arrival.send_again(0, 1.0) if isinstance(effect, Request)]
    assert [(message.count, message.reached) for message in again] == [(1, False)] * num_asked


@given(num_asked=st.integers(0, 10**6), num_left=st.integers(1, 10**6), chunk_bytes=st.integers(4096, 64 << 20))
def test_a_run_is_never_empty_nor_longer_than_a_message_says(num_asked: int, num_left: int, chunk_bytes: int) -> None:
    count = size_run(num_asked, num_left, chunk_bytes)
    assert 1 <= count <= min(MAX_RUN_CHUNKS, num_left)
    assert count == 1 or count * chunk_bytes <= 32 << 20


@given(num_done=st.integers(0, 10**6), num_left=st.integers(1, 10**6), chunk_bytes=st.integers(4096, 64 << 20))
def test_a_run_on_a_device_grows_within_what_a_message_says(num_done: int, num_left: int, chunk_bytes: int) -> None:
    count = size_device_run(num_done, num_left, chunk_bytes)
    assert 1 <= count <= min(MAX_RUN_CHUNKS, num_left)
    assert size_device_run(num_done + 1, num_left, chunk_bytes) >= count


@pytest.mark.parametrize("runner", [None, run_by_numpy], ids=["by-torch", "by-tables"])
def test_a_device_lands_one_run_while_the_next_is_begun(
    packed: Packed, runner: Runner | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_passes, "find_runner", lambda device: runner)
    monkeypatch.setattr(limits, "_DEVICE_RUN_BYTES", 4 * CHUNK_BYTES)
    snapshot = packed.pack(1, "off")
    memory = torch.from_numpy(packed.packer.arena)
    staging = packed.stage(snapshot, Shadow(device=torch.device("cpu")))
    assert isinstance(staging, DeviceStaging)
    arrival = Arrival(Announce(snapshot.version, ()), staging, CHUNK_BYTES, Limits(), 0.0, {0: ON_DEVICE})
    requests: deque[Effect] = deque(arrival.begin(0.0))
    begun: deque[tuple[ChunkHeader, RunLanding]] = deque()
    counts = []
    while requests or begun:
        if requests:
            request = requests.popleft()
            assert isinstance(request, Request) and len(arrival.asked_s) <= 2 * MAX_RUN_CHUNKS
            index, count = request.message.index, request.message.count
            header = ChunkHeader(snapshot.version, index, "dense", None, b"", count)
            assert lands_run(arrival, 0, header)
            start, num_bytes = staging.layouts[0].find_span(index, count) or (0, 0)
            run = staging.begin_run(0, header, memory[start : start + num_bytes])
            assert run is not None
            begun.append((header, run))
            counts.append(count)
        if len(begun) > 1 or not requests:
            header, landing = begun.popleft()
            requests += arrival.land(0, header, landing, 0.0, is_hashed=False)
    assert counts[:4] == [4, 8, 16, 32] and counts[-1] <= 4 and sum(counts) == NUM_CHUNKS
    assert arrival.is_staged and arrival.tensors is not None and arrival.num_bytes == NUM_CHUNKS * CHUNK_BYTES
    assert torch.equal(arrival.tensors["w"], packed.tensors["w"])


def test_limits_that_grant_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="grant no sound credit"):
        Limits(credit_chunks=0)


@given(num_chunks=st.integers(0, 10**5), chunk_bytes=st.integers(4096, 64 << 20))
def test_what_is_all_there_is_cut_into_few_runs_of_like_sizes(num_chunks: int, chunk_bytes: int) -> None:
    counts = limits.cut_runs(num_chunks, chunk_bytes)
    assert sum(counts) == num_chunks
    if counts:
        assert 1 <= max(counts) <= min(counts) + 1 and max(counts) * chunk_bytes <= 4 << 30
        assert len(counts) == 1 or len(counts) <= 2 + num_chunks * chunk_bytes / (4 << 30) * 1.02


@pytest.mark.parametrize(
    ("ready", "kind", "device", "reads"),
    [
        ((0,), ON_DEVICE, "cpu", True),
        ((), ON_DEVICE, "cpu", False),
        ((1,), ON_DEVICE, "cpu", False),
        ((0,), "shared_memory", "cpu", False),
        ((0,), ON_DEVICE, None, False),
    ],
)
def test_of_a_source_that_has_all_ready_a_device_reads_without_asking(
    packed: Packed, ready: tuple[int, ...], kind: str, device: str | None, reads: bool
) -> None:
    snapshot = packed.pack(1, "off")
    staging = packed.stage(snapshot, Shadow(device=None if device is None else torch.device(device)))
    arrival = Arrival(Announce(snapshot.version, (), ready), staging, CHUNK_BYTES, Limits(), 0.0, {0: kind})
    effects = arrival.begin(0.0)
    assert effects and all(isinstance(effect, Read if reads else Request) for effect in effects)
    if not reads:
        return
    (read,) = effects
    assert isinstance(read, Read) and isinstance(staging, DeviceStaging) and not arrival.asked_s
    assert (read.header.index, read.header.count) == (0, NUM_CHUNKS) and lands_run(arrival, 0, read.header)
    landing = staging.begin_run(0, read.header, torch.from_numpy(packed.packer.arena))
    assert arrival.land(0, read.header, landing, 0.0, is_hashed=False) == [] and arrival.is_staged
    assert arrival.tensors is not None and torch.equal(arrival.tensors["w"], packed.tensors["w"])


def test_what_was_to_be_read_and_cannot_be_is_asked_for(packed: Packed) -> None:
    snapshot = packed.pack(1, "off")
    staging = packed.stage(snapshot, Shadow(device=torch.device("cpu")))
    arrival = Arrival(Announce(snapshot.version, (), (0,)), staging, CHUNK_BYTES, Limits(), 0.0, {0: ON_DEVICE})
    (read,) = arrival.begin(0.0)
    assert isinstance(read, Read)
    asked = deque(arrival.ask_for(0, read.header, 0.0))
    indices = []
    while asked:
        request = asked.popleft()
        assert isinstance(request, Request) and request.message.count == 1
        index = request.message.index
        indices.append(index)
        raw = np.array(snapshot.states[index].bits)
        header = ChunkHeader(snapshot.version, index, "dense", None, b"")
        asked += arrival.land(0, header, raw, 0.0, is_hashed=False)
    assert indices == list(range(NUM_CHUNKS)) and arrival.is_staged
