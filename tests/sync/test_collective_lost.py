"""Broadcasts of versions whose members are killed or stopped, or do not come."""

import signal
import time
from typing import Any

import pytest
import torch
from tests.sync.collective_parts import ROWS, change, engines_of, making_source, small_source
from tests.sync.collective_peers import (
    LOST_AFTER_S,
    PATIENCE_S,
    Peer,
    cut_source,
    name_bits,
    peers,
)
from tests.sync.parts import make_model, random_bits

from weightcast.sync.errors import (
    DeadlineExceeded,
    PeerLost,
    SourceError,
)
from weightcast.sync.regions import HeldRegion
from weightcast.sync.transports.collective_source import CollectiveSource
from weightcast.sync.transports.collective_target import CollectiveReceiver

# From the failure to the error: the heartbeats' limit before it is certain, and again to tell who it was.
MOST_S = 2 * LOST_AFTER_S + 6.0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_engine_does_not_hang_the_trainer_and_the_others_go_on(how: signal.Signals) -> None:
    tensors = make_model(4, ROWS) | {"large": random_bits(torch.bfloat16, (1 << 20,), 9)}
    with making_source(tensors, 3) as source, engines_of(source, 3, 2) as engines:
        source.broadcast(1)
        for engine in engines:
            assert engine.hear()["version"] == 1
        engines[1].signal(how)
        change(tensors, 5)
        start_s = time.monotonic()
        with pytest.raises(PeerLost, match=r"source-0 .*version 2 .*generation 1.*lost: engine-1\. .*rebuild"):
            source.broadcast(2)
        assert time.monotonic() - start_s < MOST_S
        assert source.lost == ("engine-1",)
        for engine in (engines[0], engines[2]):
            said = engine.hear()
            assert said["error"] == "PeerLost" and "rejoin" in said["text"]
            engine.tell("rejoin")
        assert source.rebuild().engines == ("engine-0", "engine-2")
        report = source.broadcast(3)
        assert report.generation == 2 and len(report.engines) == 2
        for engine in (engines[0], engines[2]):
            assert engine.hear() == {"version": 3, "bits": name_bits(tensors)}
        if how == signal.SIGSTOP:
            engines[1].signal(signal.SIGCONT)
            assert engines[1].hear()["error"] == "PeerLost"
            engines[1].tell("rejoin")
            with pytest.raises(AssertionError, match="engine-1 is not in generation 2"):
                engines[1].hear()


class Interrupting:
    """A source of which one live view calls `act`, in the middle of a version."""

    def __init__(self, tensors: dict[str, torch.Tensor], act: Any) -> None:
        self._inner = cut_source(tensors, 0, 1)
        self._act = act
        self.rank, self.world_size, self.specs = 0, 1, self._inner.specs

    def held(self) -> list[HeldRegion]:
        """The regions; before the middle one is read, `act` runs: what is left is more than sockets hold unread."""
        regions = self._inner.held()
        middle = regions[len(regions) // 2]

        def live() -> torch.Tensor:
            self._act()
            return middle.live()

        return [HeldRegion(middle.region, live) if held is middle else held for held in regions]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_lost_in_the_middle_of_a_version(how: signal.Signals) -> None:
    tensors = {f"t{index}": random_bits(torch.bfloat16, (1 << 20,), index) for index in range(24)}
    engines: list[Peer] = []
    source_of = Interrupting(tensors, lambda: engines[0].signal(how))
    options: dict[str, Any] = {"timeout_s": PATIENCE_S, "lost_after_s": LOST_AFTER_S, "bucket_bytes": 4 << 20}
    with (
        CollectiveSource(source_of, "tcp://127.0.0.1:0", engines=("engine-0", "engine-1"), **options) as source,
        engines_of(source, 2, 1) as made,
    ):
        engines += made
        start_s = time.monotonic()
        with pytest.raises(PeerLost, match="lost: engine-0"):
            source.broadcast(1)
        assert time.monotonic() - start_s < MOST_S + 5.0
        assert engines[1].hear()["error"] == "PeerLost"
        engines[1].tell("rejoin")
        source_of._act = lambda: None
        source.rebuild()
        assert len(source.broadcast(2).engines) == 1
        assert engines[1].hear()["bits"] == name_bits(tensors)


def test_a_source_that_is_lost_is_named_and_the_rest_says_what_is_missing() -> None:
    tensors = make_model(6, ROWS)
    with (
        making_source(tensors, 1, world_size=2) as source,
        engines_of(source, 1, 2) as (engine,),
        peers((small_source, source.address, tensors, 1, 2, [1, 2])) as (other,),
    ):
        source.broadcast(1)
        assert other.hear()["engines"] == 1 and engine.hear()["version"] == 1
        other.signal(signal.SIGSTOP)
        with pytest.raises(PeerLost, match="lost: source-1"):
            source.broadcast(2)
        assert engine.hear()["error"] == "PeerLost"
        with pytest.raises(SourceError, match="do not make a whole model"):
            source.rebuild()


def test_the_host_of_the_store_is_lost() -> None:
    tensors = make_model(7, ROWS)
    with peers((_host, tensors)) as (host,):
        address = host.hear()
        with CollectiveReceiver(address, "engine-0", timeout_s=PATIENCE_S, lost_after_s=LOST_AFTER_S) as receiver:
            host.tell("go")
            assert name_bits(receiver.receive().tensors) == name_bits(tensors)
            host.signal(signal.SIGSTOP)
            start_s = time.monotonic()
            with pytest.raises(PeerLost, match=r"source rank 0|source-0"):
                receiver.receive(timeout_s=PATIENCE_S)
            assert time.monotonic() - start_s < MOST_S


def _host(pipe: Any, tensors: dict[str, torch.Tensor]) -> None:
    with making_source(tensors, 1) as source:
        pipe.send(source.address)
        pipe.recv()
        source.broadcast(1)
        pipe.recv()


def test_a_member_that_does_not_come_is_named() -> None:
    with making_source(make_model(8), 2) as source, engines_of(source, 1, 1):
        start_s = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="have not come: engine-1; start them"):
            source.broadcast(1, timeout_s=3.0)
        assert time.monotonic() - start_s < 6.0
    with pytest.raises(DeadlineExceeded, match="start source rank 0 first"):
        CollectiveReceiver(source.address.rsplit(":", 1)[0] + ":1", "engine-0", timeout_s=0.5)
