"""An engine that leaves: what it said before has arrived, and what it served is in the report."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zmq
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, make_model

from weightcast.sync import FleetPolicy, Limits, WeightPublisher, WeightSubscriber
from weightcast.sync.acquaintance import Acquaintance, is_farewell
from weightcast.sync.coordinator import Coordinator
from weightcast.sync.messages import (
    PROTOCOL,
    Bye,
    Goodbye,
    Hello,
    Message,
    Packed,
    Packing,
    Pong,
    Published,
    Serving,
    SourceHello,
    Staged,
    Welcome,
    decode,
    encode,
)
from weightcast.sync.records import SourceReport
from weightcast.sync.transports import zmq_sockets
from weightcast.sync.version import Version, fingerprint

SPECS = tuple(TensorSource({"w": torch.zeros(8)}).specs())
VERSION = Version(7, 1)


def make_coordinator(policy: FleetPolicy) -> Coordinator:
    """Rank 0's, with version 1 packed and the engines `a` and `b` at it."""
    coordinator = Coordinator(SPECS, 1, 7, 4096, policy, 10.0, 0.0)
    coordinator.add_source(b"s", SourceHello(PROTOCOL, 0, 1, fingerprint(SPECS), "ipc:///0", (SPECS[0].whole(),)))
    for name in "ab":
        coordinator.receive(name.encode(), Hello(PROTOCOL, name, "receiver", None), 0.0)
    coordinator.add_packing(b"s", Packing(1, ()), 0.0, 9.0)
    coordinator.add_part(b"s", Packed(1, bytes(8), SourceReport(0, 0.0, 0, 0, None), ()), 0.0)
    return coordinator


def tell(coordinator: Coordinator, peer: bytes, *messages: Message) -> list[tuple[bytes, Message]]:
    """What the coordinator answers to an engine's messages, and to whom."""
    return [(out.peer, out.message) for m in messages for out in coordinator.receive(peer, m, 1.0)]


STAGED = Staged(VERSION, 32, 0.1, 1, (), "zmq", 0, 32)
SERVING = Serving(VERSION, 0.0, ())


@pytest.mark.parametrize("policy", [FleetPolicy.all(), FleetPolicy.all(minimum=2), FleetPolicy.quorum(2)], ids=str)
def test_one_that_served_a_version_and_left_is_in_its_report(policy: FleetPolicy) -> None:
    coordinator = make_coordinator(policy)
    for name in (b"a", b"b"):
        tell(coordinator, name, STAGED)
    sends = tell(coordinator, b"a", SERVING, Bye())
    assert [peer for peer, message in sends if isinstance(message, Goodbye)] == [b"a"]
    published = next(message for _, message in tell(coordinator, b"b", SERVING) if isinstance(message, Published))
    assert {report.engine: report.state for report in published.engines} == {"a": "serving", "b": "serving"}
    assert not published.error and [engine.engine for engine in coordinator.engines.values()] == ["b"]


def test_one_that_came_back_is_in_it_once() -> None:
    coordinator = make_coordinator(FleetPolicy.all())
    for name in (b"a", b"b"):
        tell(coordinator, name, STAGED)
    tell(coordinator, b"a", SERVING, Bye())
    tell(coordinator, b"a2", Hello(PROTOCOL, "a", "receiver", VERSION))
    published = next(message for _, message in tell(coordinator, b"b", SERVING) if isinstance(message, Published))
    assert sorted(report.engine for report in published.engines) == ["a", "b"]


def test_one_that_left_without_serving_is_not_waited_for_nor_reported() -> None:
    coordinator = make_coordinator(FleetPolicy.all())
    for name in (b"a", b"b"):
        tell(coordinator, name, STAGED)
    tell(coordinator, b"a", Bye())
    published = next(message for _, message in tell(coordinator, b"b", SERVING) if isinstance(message, Published))
    assert [report.engine for report in published.engines] == ["b"]


def test_a_goodbye_is_awaited_of_those_who_know_this_engine() -> None:
    known = Acquaintance(Limits(lost_after_s=4.0))
    assert not known.awaits_goodbye
    known.hear(Welcome(PROTOCOL, 7, SPECS), 0.0)
    assert known.awaits_goodbye
    known.hear(Goodbye("the publisher was closed", final=False), 1.0)
    assert not known.awaits_goodbye and not known.is_dismissed
    known.hear(Welcome(PROTOCOL, 8, SPECS), 2.0)
    assert known.awaits_goodbye and known.is_lost(7.0) and not known.awaits_goodbye
    assert is_farewell([encode(Goodbye("", True))]) and is_farewell([encode(Pong(7, False))])
    assert not any(map(is_farewell, ([encode(Pong(7, True))], [b"noise"], [], [b"", b""])))


def test_engines_that_close_right_after_their_last_commit_are_in_the_report(ipc: str) -> None:
    tensors = make_model(1)
    slow_may_go = threading.Event()

    def serve(name: str, number: int) -> None:
        with WeightSubscriber(ipc, engine=name, limits=LIMITS, transport="zmq") as subscriber:
            while (update := subscriber.wait(WAIT_S)).version.number < number:
                update.commit()  # who joins is given the version before
            if name == "slow":
                slow_may_go.wait(WAIT_S)
            update.commit()
        if name == "quick":
            slow_may_go.set()

    with (
        WeightPublisher(TensorSource(tensors), ipc, timeout_s=WAIT_S, policy=FleetPolicy.all(minimum=2)) as publisher,
        ThreadPoolExecutor(2) as threads,
    ):
        for number in range(1, 6):
            slow_may_go.clear()
            served = [threads.submit(serve, name, number) for name in ("quick", "slow")]
            publisher.wait_for_subscribers(2)
            report = publisher.publish(number)
            assert sorted(report.serving) == ["quick", "slow"], number
            for one in served:
                one.result()


def test_to_leave_a_publisher_that_does_not_answer_takes_a_second(ipc: str) -> None:
    context = zmq.Context()
    router, _ = zmq_sockets.bind(context, ipc, None, 1 << 20)
    subscriber = WeightSubscriber(ipc, engine="engine", limits=LIMITS)
    peer, raw = router.recv_multipart()
    assert isinstance(decode(raw), Hello)
    router.send_multipart([peer, encode(Welcome(PROTOCOL, 7, SPECS))])
    subscriber.specs(WAIT_S)
    start_s = time.monotonic()
    subscriber.close()
    assert 0.9 < time.monotonic() - start_s < WAIT_S / 2
    heard = []
    while router.poll(1000):
        heard.append(type(decode(router.recv_multipart()[1])))
        if heard[-1] is Bye:
            break
    assert heard[-1] is Bye
    router.close(0)
    context.term()
    zmq_sockets.remove_ipc_file(ipc)
