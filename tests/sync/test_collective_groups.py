"""One group's broadcasts, both ends in one process: order, damage, what does not fit, deadlines, and what is left."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
from tests.sync.parts import WAIT_S
from torch._C._distributed_c10d import PrefixStore

from weightcast.sync.errors import ConfigError, DeadlineExceeded, WireError
from weightcast.sync.transports.collective_backend import (
    BroadcastGroup,
    connect_store,
    listen_store,
)
from weightcast.sync.transports.collective_buckets import BucketPlan, plan_buckets
from weightcast.sync.transports.collective_receiver import BucketReceiver, Received
from weightcast.sync.transports.collective_sender import BucketSender
from weightcast.sync.version import Version

V1, V2 = Version(7, 1), Version(7, 2)
SIZES = [4000, 96, 4096, 1, 8192, 7, 4096, 4096, 300]
Bytes = npt.NDArray[np.uint8]


def no_watch() -> None:
    """Nobody is looked after."""


def closing() -> set[threading.Thread]:
    """The threads that stay with closed groups until their broadcasts have ended."""
    return {thread for thread in threading.enumerate() if thread.name == "weightcast-closes-group"}


def soon() -> float:
    """A deadline."""
    return time.monotonic() + WAIT_S


class Ends:
    """A sender and receivers of one group, and what came."""

    def __init__(self, groups: list[BroadcastGroup]) -> None:
        self.groups = groups
        self.sender = BucketSender(groups[0], source_rank=5, generation=2)
        self.receivers = [BucketReceiver(group, source_rank=5, generation=2) for group in groups[1:]]
        self.taken: list[list[tuple[int, int, bytes, bytes]]] = [[] for _ in self.receivers]

    def run(
        self,
        send: Callable[[], None],
        plan: BucketPlan,
        version: Version | None = None,
        deadline_s: float = WAIT_S,
        take: Callable[..., object] | None = None,
    ) -> list[Received | BaseException]:
        """Send, receive on every receiver, and give what each got or raised; the sender's error goes last."""
        results: list[Any] = [None] * (len(self.receivers) + 1)

        def receive(index: int) -> None:
            def keep(rank: int, chunk: int, value: bytes, buffer: Bytes) -> None:
                self.taken[index].append((rank, chunk, value, buffer.tobytes()))
                if take is not None:
                    take(rank, chunk, value, buffer)

            deadline = time.monotonic() + deadline_s
            results[index] = self.receivers[index].receive(plan, keep, deadline, no_watch, version)

        def guard(index: int, function: Callable[[], None]) -> None:
            try:
                function()
            except BaseException as error:
                results[index] = error

        jobs: list[tuple[int, Callable[[], None]]] = [
            (index, partial(receive, index)) for index in range(len(self.receivers))
        ]
        threads = [threading.Thread(target=guard, args=job) for job in [*jobs, (-1, send)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
        return results


@contextmanager
def ends(num_receivers: int = 1) -> Iterator[Ends]:
    """A group over gloo, its members in threads."""
    stores = [listen_store("127.0.0.1", 0, WAIT_S)]
    stores += [connect_store("127.0.0.1", stores[0].port, soon()) for _ in range(num_receivers)]
    groups: list[Any] = [None] * len(stores)

    def build(rank: int) -> None:
        store = PrefixStore("a", stores[rank])
        groups[rank] = BroadcastGroup.build("gloo", store, rank, len(stores), WAIT_S, "127.0.0.1")

    threads = [threading.Thread(target=build, args=(rank,)) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    try:
        yield Ends(groups)
    finally:
        for group in groups:
            group.close()


def make_chunks(seed: int, sizes: list[int] = SIZES) -> list[Bytes]:
    """Random bytes of these sizes."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def packing(chunks: list[Bytes], spoil: Callable[[int, Bytes], None] = lambda index, into: None) -> Any:
    """A pack function for chunks; `spoil` may change bytes after they were hashed."""

    def pack(index: int, into: Bytes) -> bytes:
        into[:] = chunks[index]
        value = xxhash.xxh3_128_digest(into.data)
        spoil(index, into)
        return value

    return pack


@pytest.mark.parametrize("num_receivers", [1, 2, 4])
def test_chunks_come_in_order_with_their_hashes_version_after_version(num_receivers: int) -> None:
    plan = plan_buckets(SIZES, 8192)
    assert len(plan.buckets) > 4
    with ends(num_receivers) as both:
        for version in (V1, V2):
            chunks = make_chunks(version.number)
            seal = f"seal of {version}".encode()
            results = both.run(
                lambda chunks=chunks, version=version, seal=seal: both.sender.send(  # type: ignore[misc]
                    version, plan, packing(chunks), soon(), no_watch, lambda: seal
                ),
                plan,
            )
            assert results == [*[Received(version, plan.num_bytes, (), seal)] * num_receivers, None]
            expected = [(5, i, xxhash.xxh3_128_digest(c.data), c.tobytes()) for i, c in enumerate(chunks)]
            for taken in both.taken:
                assert taken == expected
                taken.clear()


def test_an_arena_is_sent_from_where_it_lies() -> None:
    plan = plan_buckets(SIZES, 8192)
    chunks = make_chunks(3)
    arena = np.concatenate(chunks)
    hashes = [xxhash.xxh3_128_digest(chunk.data) for chunk in chunks]
    with ends() as both:
        results = both.run(lambda: both.sender.send_arena(V1, plan, arena, hashes, soon(), no_watch), plan, V1)
        assert results == [Received(V1, len(arena), (), b""), None]
        assert [bytes_ for *_, bytes_ in both.taken[0]] == [chunk.tobytes() for chunk in chunks]
        with pytest.raises(ConfigError, match="plan its own chunks"):
            both.sender.send_arena(V2, plan, arena[1:], hashes, soon(), no_watch)


def test_a_version_without_chunks_is_a_version() -> None:
    plan = plan_buckets([], 8192)
    with ends() as both:
        results = both.run(lambda: both.sender.send(V1, plan, packing([]), soon(), no_watch), plan)
        assert results == [Received(V1, 0, (), b""), None]


def test_damaged_chunks_are_named_and_not_given_out_and_the_rest_is() -> None:
    plan = plan_buckets(SIZES, 8192)
    chunks = make_chunks(4)

    def spoil(index: int, into: Bytes) -> None:
        if index in (1, 6):
            into[len(into) // 2] ^= 0x40

    with ends() as both:
        results = both.run(lambda: both.sender.send(V1, plan, packing(chunks, spoil), soon(), no_watch), plan)
        assert results == [Received(V1, plan.num_bytes, (1, 6), b""), None]
        assert [index for _, index, *_ in both.taken[0]] == [0, 2, 3, 4, 5, 7, 8]
        # the group is whole: the next version may mend it
        both.run(lambda: both.sender.send(V2, plan, packing(chunks), soon(), no_watch), plan)
        assert len(both.taken[0]) == 7 + len(SIZES)


@pytest.mark.parametrize(
    ("sizes", "version", "fault"),
    [
        ([*SIZES[:-1], 301], None, "other sizes than planned"),
        (SIZES, V2, r"OPEN of version 2 \(epoch 7\) is due"),
    ],
)
def test_what_was_not_planned_is_refused_and_nothing_of_it_used(
    sizes: list[int], version: Version | None, fault: str
) -> None:
    plan = plan_buckets(SIZES, 8192)
    with ends() as both:
        deadline = time.monotonic() + 2.0
        results = both.run(
            lambda: both.sender.send(V1, plan, packing(make_chunks(5)), deadline, no_watch),
            plan_buckets(sizes, 8192),
            version,
        )
        assert isinstance(results[0], WireError)
        with pytest.raises(WireError, match=fault):
            raise results[0]
        assert both.taken == [[]]
        assert results[-1] is not None, "the sender's group is broken as well"


def test_another_generation_is_refused() -> None:
    plan = plan_buckets(SIZES, 8192)
    with ends() as both:
        both.sender = BucketSender(both.groups[0], source_rank=5, generation=1)
        results = both.run(
            lambda: both.sender.send(V1, plan, packing(make_chunks(6)), time.monotonic() + 2.0, no_watch), plan
        )
        assert isinstance(results[0], WireError) and "generation 2 was expected" in str(results[0])


def test_something_else_than_a_header_is_refused() -> None:
    plan = plan_buckets(SIZES, 8192)
    with ends() as both:
        noise = torch.full((4096,), 7, dtype=torch.uint8)
        results = both.run(lambda: both.groups[0].wait(both.groups[0].broadcast(noise, soon()), soon(), no_watch), plan)
        assert isinstance(results[0], WireError) and "does not begin with a header" in str(results[0])


def test_a_receiver_has_a_deadline_when_nobody_sends() -> None:
    plan = plan_buckets(SIZES, 8192)
    with ends() as both:
        start_s = time.monotonic()
        results = both.run(lambda: None, plan, deadline_s=0.5)
        assert isinstance(results[0], DeadlineExceeded) and time.monotonic() - start_s < 3.0


def test_a_sender_has_a_deadline_when_nobody_receives_and_frees_what_it_held() -> None:
    sizes = [1 << 20] * 64
    plan = plan_buckets(sizes, 8 << 20)
    chunks = make_chunks(7, sizes)
    before = closing()  # groups of other tests may wait for longer deadlines
    with ends() as both:
        start_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            both.sender.send(V1, plan, packing(chunks), time.monotonic() + 1.0, no_watch)
        assert time.monotonic() - start_s < 2.0
        deadline = soon()
        while closing() - before:
            assert time.monotonic() < deadline, "the closed group is never freed"
            time.sleep(0.05)


def test_what_watch_and_pack_and_take_raise_comes_out_and_ends_the_group() -> None:
    class Lost(Exception):
        pass

    def lose(*_: object) -> bytes:
        raise Lost

    plan = plan_buckets([1 << 20] * 64, 8 << 20)
    for send_with in ("watch", "pack"):
        with ends() as both, pytest.raises(Lost):
            pack, watch = (lose, no_watch) if send_with == "pack" else (packing(make_chunks(8, [1 << 20] * 64)), lose)
            both.sender.send(V1, plan, pack, soon(), watch)  # type: ignore[arg-type]
    with ends() as both:
        small = plan_buckets(SIZES, 8192)
        results = both.run(
            lambda: both.sender.send(V1, small, packing(make_chunks(9)), time.monotonic() + 2.0, no_watch),
            small,
            take=lose,
        )
        assert isinstance(results[0], Lost)


def test_roles_follow_from_ranks() -> None:
    with ends() as both:
        with pytest.raises(ConfigError, match="use a BucketReceiver"):
            BucketSender(both.groups[1], 0, 1)
        with pytest.raises(ConfigError, match="use a BucketSender"):
            BucketReceiver(both.groups[0], 0, 1)
