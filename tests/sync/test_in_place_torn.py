"""Versions that come to the engine's own tensors by half, over real sockets: torn, said to be, and whole again."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.sync.in_place_parts import (
    CHUNK_BYTES,
    TORN,
    Fused,
    bump,
    copy_of,
    land,
    landing,
    make_layers,
    publishing,
)
from tests.sync.middle import Middle, pass_on
from tests.sync.parts import LIMITS, WAIT_S, assert_same_bits, make_model, wait_until
from tests.sync.peer import Peer

from weightcast.sync import FleetPolicy, TensorSpec, WeightSubscriber
from weightcast.sync.errors import (
    DeadlineExceeded,
    EngineError,
    PeerLost,
    WireError,
)
from weightcast.sync.in_place import Held


def test_a_deadline_tears_and_the_next_wait_goes_on_where_it_was(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        publishing(tensors, ipc, delta="auto") as publisher,
        Middle(ipc) as middle,
        WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(DeadlineExceeded, match=r"no version newer than None was announced$"):
            subscriber.wait(0.1)
        middle.alter = lambda index, header, body: [] if index == 3 else [[header, body]]
        publication = publisher.begin(1)
        with pytest.raises(DeadlineExceeded, match=f"version 1 .* lacks 1 chunks.*the tensors of engine 'e' {TORN}"):
            subscriber.wait(2.0)
        assert subscriber.held == Held(is_torn=True)
        middle.alter = pass_on
        torn = copy_of(into)
        time.sleep(2 * LIMITS.chunk_timeout_s)
        assert_same_bits(copy_of(into), torn)
        assert land(subscriber, into, tensors) < 1.5 * CHUNK_BYTES, "what had landed is not fetched again"
        assert publication.wait().serving == ("e",)


def test_a_delta_on_torn_tensors_begins_from_what_each_chunk_has(ipc: str) -> None:
    """Version 2 stops half way, and version 3 comes as what changed since 2 here and since 1 there."""
    tensors, into = make_layers(1), Fused().views()
    with (
        publishing(tensors, ipc) as publisher,
        Middle(ipc) as middle,
        landing(middle.address, into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        dense_bytes = land(subscriber, into, tensors)
        publication.wait()
        bump(tensors)
        middle.alter = lambda index, header, body: [] if index % 2 else [[header, body]]
        publication = publisher.begin(2, timeout_s=2.0)
        with pytest.raises(DeadlineExceeded, match=TORN):
            subscriber.wait(1.0)
        with pytest.raises(DeadlineExceeded, match="did not reach the fleet"):
            publication.wait()
        bump({name: tensor for name, tensor in tensors.items() if "proj" in name})
        middle.alter = pass_on
        publication = publisher.begin(3)
        assert land(subscriber, into, tensors) < dense_bytes / 4
        publication.wait()


def test_a_version_that_replaces_one_on_its_way_lands_over_it(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        publishing(tensors, ipc) as publisher,
        Middle(ipc, lambda index, header, body: [] if index == 2 else [[header, body]]) as middle,
        landing(middle.address, into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        with ThreadPoolExecutor(1) as pool:
            landed = pool.submit(land, subscriber, into, tensors)
            with pytest.raises(DeadlineExceeded):
                publisher.publish(1, timeout_s=1.0)
            bump(tensors)
            middle.alter = pass_on
            assert publisher.publish(2).serving == ("e",)
            assert landed.result() < sum(tensor.nbytes for tensor in tensors.values()) / 2


def test_an_abandoned_version_is_not_to_be_served_and_the_next_one_begins_from_it(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    policy = FleetPolicy.all()
    other = [TensorSpec("other", torch.float32, (2,))]
    with (
        publishing(tensors, ipc, policy=policy) as publisher,
        landing(ipc, into) as subscriber,
    ):
        with WeightSubscriber(ipc, engine="refuses", limits=LIMITS, expect=other):
            publisher.wait_for_subscribers(2)
            publication = publisher.begin(1)
            with pytest.raises(
                DeadlineExceeded, match=r"version 1 .*, which is whole and was not released; do not serve"
            ):
                subscriber.wait(3.0)
            with pytest.raises(EngineError, match="did not reach the fleet under the policy all"):
                publication.wait()
            assert subscriber.held == Held(is_torn=True) and subscriber.serving is None
        wait_until(lambda: len(publisher.fleet()) == 1)
        bump(tensors)
        publication = publisher.begin(2)
        assert land(subscriber, into, tensors) < sum(tensor.nbytes for tensor in tensors.values()) / 4
        assert publication.wait().serving == ("e",)


def test_what_the_engine_changed_itself_is_noticed_and_fetched(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        publishing(tensors, ipc) as publisher,
        landing(ipc, into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            publication = publisher.begin(number)
            num_bytes = land(subscriber, into, tensors)
            assert publication.wait().engines[0].num_repeats > 0 or number == 1
            into["gate_proj.weight"].mul_(3)
            bump(tensors)
        assert 0 < num_bytes < 5 * into["gate_proj.weight"].nbytes


def test_a_publisher_that_is_killed_leaves_torn_tensors_which_its_successor_makes_whole() -> None:
    rows = 5000
    into = {name: torch.zeros_like(tensor) for name, tensor in make_model(0, rows).items()}
    with Peer("publish", "tcp://127.0.0.1:0", 0, 1, rows) as publisher:
        address = publisher.hear()
        with (
            Middle(address) as middle,
            WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into) as subscriber,
        ):
            publisher.tell(version=1, engines=1)
            land(subscriber, into, make_model(1, rows))
            assert publisher.hear() == ["e"]
            middle.alter = lambda index, header, body: [[header, body]] if index < 2 else []
            publisher.tell(version=2, engines=1)
            with pytest.raises(DeadlineExceeded, match=TORN):
                subscriber.wait(1.0)
            publisher.signal(signal.SIGKILL)
            publisher.process.wait()
            with pytest.raises(PeerLost, match=f"was silent .* may not serve the tensors it landed in .*{TORN}"):
                subscriber.wait(WAIT_S)
            assert subscriber.held == Held(is_torn=True)
            middle.alter = pass_on
            with Peer("publish", address, 0, 1, rows) as successor:
                successor.hear()
                successor.tell(version=1, engines=1)
                land(subscriber, into, make_model(1, rows))
                assert successor.hear() == ["e"]


def test_damage_beyond_repair_tears_and_a_rejected_version_stays(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()

    def damage(index: int, header: bytes, body: bytes) -> list[list[bytes]]:
        return [[header, bytes([body[0] ^ 1]) + body[1:] if index == 1 else body]]

    with (
        publishing(tensors, ipc, delta="auto") as publisher,
        Middle(ipc, damage) as middle,
        WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        with pytest.raises(WireError, match=TORN):
            subscriber.wait(WAIT_S)
        with pytest.raises(EngineError):
            publication.wait()
        middle.alter = pass_on
        publication = publisher.begin(2)
        update = subscriber.wait(WAIT_S)
        update.reject("no")
        with pytest.raises(EngineError, match="no"):
            publication.wait()
        assert subscriber.serving is None and subscriber.held == Held(update.version)
        assert_same_bits(copy_of({name: into[name] for name in tensors}), tensors)
