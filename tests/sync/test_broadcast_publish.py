"""Versions by broadcast, from publishers to engines over real Gloo groups: what they carry, and what breaks them."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.sync.broadcast_parts import (
    BY_BROADCAST,
    PATIENT,
    TCP,
    change,
    generation_of,
    make_engine,
    make_large,
    publish_all,
    wait_for_engines,
)
from tests.sync.collective_peers import Peer, peers
from tests.sync.parts import (
    WAIT_S,
    TensorSource,
    assert_same_bits,
    publishers,
    running,
    wait_until,
)

from weightcast.sync import Limits, PublishReport, Region, WeightPublisher, WeightSubscriber
from weightcast.sync.broadcast_taking import BroadcastTaker
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.transports import collective_server
from weightcast.sync.version import Version


def test_two_sources_broadcast_to_two_engines_and_one_that_joins_later() -> None:
    tensors = make_large(3)
    with publishers(tensors, 2, TCP, **BY_BROADCAST) as made:
        engines = [make_engine(f"engine-{number}", made[0]) for number in range(3)]
        with running(*engines[:2]):
            wait_for_engines(made, 2)
            for number in (1, 2):
                change(tensors, number)
                report = publish_all(made, number)
                assert {engine.transport for engine in report.engines} == {"collective"}
                assert report.num_bytes >= 2 * made[0].num_bytes and report.num_repeats == 0
            assert [generation_of(publisher) for publisher in made] == [1, 1]
            with running(engines[2]):
                wait_for_engines(made, 3)
                # It has the version that was current when it came, by request, if it was in time.
                change(tensors, 3)
                report = publish_all(made, 3)
                assert {engine.transport for engine in report.engines} == {"collective"}
                assert [generation_of(publisher) for publisher in made] == [2, 2]
                for engine in engines:
                    assert engine.numbers[-1] == 3 and engine.errors == []
                    assert_same_bits(engine.tensors, tensors)
            # Who leaves is left out at the next border.
            wait_for_engines(made, 2)
            change(tensors, 4)
            report = publish_all(made, 4)
            assert {e.transport for e in report.engines if e.state == "serving"} == {"collective"}
            assert [generation_of(publisher) for publisher in made] == [3, 3]
            assert_same_bits(engines[0].tensors, tensors)


class PacedSource(TensorSource):
    """A source whose tensor `large` is packed when the test lets it, from its second version on."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def _view(self, region: Region) -> torch.Tensor:
        if region.name == "large":
            assert self.may_go_on.wait(WAIT_S)
        return super()._view(region)


def follow(pipe: Any, address: str, name: str) -> None:
    """An engine in a process, which serves whatever comes."""
    limits = Limits(chunk_timeout_s=WAIT_S, lost_after_s=8.0)
    with WeightSubscriber(address, engine=name, transport="collective", limits=limits) as subscriber:
        pipe.send("here")
        while True:
            subscriber.wait(3 * WAIT_S).commit()


@contextmanager
def pausing(source: PacedSource, publisher: WeightPublisher, number: int) -> Iterator[Callable[[], PublishReport]]:
    """A version of which one part is under way and the other not packed; what comes out of the block ends it."""
    source.may_go_on.clear()
    publication = publisher.begin(number, hold=True)

    def end() -> PublishReport:
        source.may_go_on.set()
        return publication.wait()

    yield end
    source.may_go_on.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_engine_that_dies_amid_a_version_holds_nobody_up(number: signal.Signals) -> None:
    # More than a bucket comes before what the test holds back.
    tensors = {"first": torch.full((36 << 20,), 7, dtype=torch.uint8)} | make_large(4)
    source = PacedSource(tensors)
    with (
        WeightPublisher(source, TCP, lost_after_s=2.0, **BY_BROADCAST) as publisher,
        peers((follow, publisher.address, "dying")) as (dying,),
    ):
        assert isinstance(dying, Peer) and dying.hear() == "here"
        engines = [make_engine(f"engine-{index}", publisher) for index in range(2)]
        with running(*engines):
            wait_for_engines([publisher], 3)
            first = publish_all([publisher], 1)
            assert {engine.transport for engine in first.engines} == {"collective"} and len(first.serving) == 3
            change(tensors, 2)
            with pausing(source, publisher, 2) as end:
                time.sleep(0.5)  # the bucket before is on its way
                dying.signal(number)
                start_s = time.monotonic()
                report = end()
            # An engine is lost after 2 s; well below what anybody who waited for the broadcast would have taken.
            assert time.monotonic() - start_s < 10
            assert sorted(report.serving) == ["engine-0", "engine-1"]
            by = {engine.engine: engine.transport for engine in report.engines}
            assert {by["engine-0"], by["engine-1"]} <= {"collective", "collective+zmq"} and by["dying"] == ""
            for engine in engines:
                assert_same_bits(engine.tensors, tensors)
            # The others go on, in a group without it.
            wait_until(lambda: able(publisher) == 2)
            change(tensors, 3)
            last = publish_all([publisher], 3)
            assert {e.transport for e in last.engines if e.state == "serving"} == {"collective"}
            assert generation_of(publisher) == 2 and engines[0].errors == engines[1].errors == []
            for engine in engines:
                assert_same_bits(engine.tensors, tensors)


def able(publisher: WeightPublisher) -> int:
    """How many engines would be in the next group."""
    server = publisher._loop.server.broadcasts
    assert server is not None
    if server._standing.broken < server._standing.generation or server.is_sending:
        return 0
    return sum(engine.after >= server._standing.broken for engine in server.engines)


def test_a_chunk_that_came_damaged_is_fetched_over_zeromq(monkeypatch: pytest.MonkeyPatch) -> None:
    right = collective_server.hash_chunk
    spoilt: set[int] = {1}
    monkeypatch.setattr(
        collective_server, "hash_chunk", lambda index, body: b"\0" * 16 if index in spoilt else right(index, body)
    )
    tensors = make_large(5)
    with WeightPublisher(TensorSource(tensors), TCP, **BY_BROADCAST) as publisher:
        engines = [make_engine(f"engine-{index}", publisher) for index in range(2)]
        with running(*engines):
            wait_for_engines([publisher], 2)
            report = publish_all([publisher], 1)
            assert {(e.transport, e.num_repeats) for e in report.engines} == {("collective+zmq", 1)}
            assert_same_bits(engines[0].tensors, tensors)
            # The group is whole.
            spoilt.clear()
            change(tensors, 2)
            report = publish_all([publisher], 2)
            assert {(e.transport, e.num_repeats) for e in report.engines} == {("collective", 0)}
            assert generation_of(publisher) == 1
    assert_same_bits(engines[1].tensors, tensors)


def test_bytes_that_were_altered_after_their_hash_was_checked_are_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    take = BroadcastTaker.take
    spoilt: list[int] = []

    def spoil(self: BroadcastTaker, rank: int, version: Version, index: int, body: ByteArray) -> None:
        if not spoilt and len(body) > 1000:
            spoilt.append(index)
            body[len(body) // 2] ^= 1
        take(self, rank, version, index, body)

    monkeypatch.setattr(BroadcastTaker, "take", spoil)
    tensors = make_large(6)
    with WeightPublisher(TensorSource(tensors), TCP, **BY_BROADCAST) as publisher:
        engines = [make_engine(f"engine-{index}", publisher) for index in range(2)]
        with running(*engines):
            wait_for_engines([publisher], 2)
            report = publish_all([publisher], 1)
    assert spoilt and sorted(engine.num_repeats > 0 for engine in report.engines) == [False, True]
    for engine in engines:
        assert_same_bits(engine.tensors, tensors)
        assert engine.errors == []


def test_an_engine_that_loads_a_version_takes_the_next_one_when_it_is_done() -> None:
    """It receives what its group is sent all the same, for nothing."""
    tensors = make_large(7)
    options = BY_BROADCAST | {"lost_after_s": 8.0}
    with WeightPublisher(TensorSource(tensors), TCP, **options) as publisher:
        quick = make_engine("quick", publisher)
        with (
            running(quick),
            WeightSubscriber(publisher.address, engine="busy", transport="collective", limits=PATIENT) as busy,
        ):
            wait_for_engines([publisher], 2)
            first = publisher.begin(1)
            update = busy.wait(WAIT_S)
            publication = threading.Thread(target=publisher.begin, args=(2,))  # waits for the first
            publication.start()
            wait_until(lambda: 1 in quick.numbers)
            update.commit()
            first.wait()
            publication.join(WAIT_S)
            update = busy.wait(WAIT_S)
            assert update.version.number == 2
            assert_same_bits(dict(update), tensors)
            update.commit()
