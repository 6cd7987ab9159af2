"""Meeting again: what happens between an engine and a coordinator that lost sight of each other. No sockets."""

import pytest
import torch
from tests.sync.parts import TensorSource

from weightcast.sync import FleetPolicy, Limits
from weightcast.sync.coordinator import Coordinator
from weightcast.sync.effects import Tell
from weightcast.sync.errors import ConfigError, PeerLost
from weightcast.sync.fleet import EngineStatus, note_serving
from weightcast.sync.messages import PROTOCOL, Goodbye, Hello, Packed, Packing, Pong, Serving, SourceHello, Welcome
from weightcast.sync.records import SourceReport
from weightcast.sync.subscription import Subscription
from weightcast.sync.version import Version, fingerprint

SPECS = tuple(TensorSource({"w": torch.zeros(8)}).specs())


def make_coordinator(world_size: int = 1) -> Coordinator:
    coordinator = Coordinator(SPECS, world_size, 7, 4096, FleetPolicy.all(), 10.0, 0.0)
    for rank in range(world_size):
        hello = SourceHello(PROTOCOL, rank, world_size, fingerprint(SPECS), f"ipc:///{rank}", (SPECS[0].whole(),))
        coordinator.add_source(bytes([rank]), hello)
    return coordinator


def make_subscription() -> Subscription:
    return Subscription("engine", "receiver", None, Limits(lost_after_s=10.0), 0.0)


def test_an_engine_that_lost_its_publisher_greets_it_again_though_it_was_not_missed() -> None:
    subscription = make_subscription()
    subscription.receive(Welcome(PROTOCOL, 7, SPECS), now_s=0.0)
    assert subscription.receive(Pong(7, known=True), now_s=1.0) == []
    subscription.tick(now_s=12.0)
    assert isinstance(subscription.error, PeerLost)
    effects = subscription.receive(Pong(7, known=True), now_s=13.0)
    assert [type(effect.message) for effect in effects if isinstance(effect, Tell)] == [Hello]


def test_a_dismissed_engine_neither_pings_nor_greets() -> None:
    subscription = make_subscription()
    subscription.receive(Welcome(PROTOCOL, 7, SPECS), now_s=0.0)
    subscription.receive(Goodbye("another engine took the name 'engine'", final=True), now_s=1.0)
    assert subscription.tick(now_s=2.0) == [] and subscription.tick(now_s=60.0) == []
    assert "took the name" in str(subscription.error)


def test_an_engine_outlives_a_publisher_that_was_closed() -> None:
    subscription = make_subscription()
    subscription.receive(Welcome(PROTOCOL, 7, SPECS), now_s=0.0)
    subscription.receive(Goodbye("the publisher was closed", final=False), now_s=1.0)
    assert subscription.tick(now_s=2.0) != []


def test_the_second_engine_of_a_name_puts_the_first_out_for_good() -> None:
    coordinator = make_coordinator()
    coordinator.receive(b"first", Hello(PROTOCOL, "engine", "receiver", None), 0.0)
    sends = coordinator.receive(b"second", Hello(PROTOCOL, "engine", "receiver", None), 1.0)
    farewell = [item.message for item in sends if item.peer == b"first"]
    assert len(farewell) == 1 and isinstance(farewell[0], Goodbye) and farewell[0].final
    assert list(coordinator.engines) == [b"second"]


def test_a_rank_that_packs_too_late_is_passed_over_and_takes_part_again() -> None:
    coordinator = make_coordinator(world_size=2)

    def pack(rank: int, number: int, now_s: float) -> None:
        digests = bytes(8) if rank == 0 else b""
        coordinator.add_packing(bytes([rank]), Packing(number, ()), now_s, now_s + 5)
        coordinator.add_part(bytes([rank]), Packed(number, digests, SourceReport(rank, 0.0, 0, 0, None), ()), now_s)

    pack(0, 1, now_s=0.0)
    assert coordinator.tick(now_s=6.0), "the deadline ends version 1"
    pack(1, 1, now_s=7.0)
    assert coordinator.publication is None
    pack(0, 2, now_s=8.0)
    pack(1, 1, now_s=8.5)
    pack(1, 2, now_s=9.0)
    assert coordinator.fault is None and coordinator.released == Version(7, 2)


def test_a_stranger_does_not_stop_a_publisher_that_has_all_its_sources() -> None:
    coordinator = make_coordinator()
    stranger = SourceHello(PROTOCOL, 1, 2, "another model", "ipc:///x", ())
    sends = coordinator.add_source(b"stranger", stranger)
    assert [type(item.message) for item in sends] == [Goodbye]
    assert coordinator.fault is None


def test_an_engine_met_anew_does_not_shorten_its_pause() -> None:
    status = EngineStatus("engine", "receiver", None, 0.0)
    version = Version(7, 1)
    status = note_serving(status, Serving(version, 0.25, ()))
    assert note_serving(status, Serving(version, 0.0, ())).pause_s == 0.25


@pytest.mark.parametrize("limits", [{"credit_chunks": 0}, {"credit_chunks": 65}, {"under_way_chunks": 0}, {"links": 0}])
def test_credit_that_would_stall_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="credit"):
        Limits(**limits)
