"""Separate processes: what is published by some is served by others, whoever is stopped or killed."""

import signal
import time

import psutil
import pytest
import torch
from tests.sync.middle import Middle, pass_on
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, make_model, make_specs
from tests.sync.peer import Peer

from weightcast.sync import FleetPolicy, WeightPublisher, WeightSubscriber
from weightcast.sync.digest import region_digest
from weightcast.sync.errors import DeadlineExceeded, PeerLost

ROWS = 5000
TCP = "tcp://127.0.0.1:0"


def digests_of(tensors: dict[str, torch.Tensor]) -> list[int]:
    """Of each tensor."""
    specs = {spec.name: spec for spec in make_specs(tensors)}
    return [region_digest(tensor, specs[name].whole()) for name, tensor in tensors.items()]


def test_two_source_processes_serve_two_engine_processes() -> None:
    with Peer("publish", TCP, 0, 2, ROWS) as zero:
        address = zero.hear()
        with Peer("publish", address, 1, 2, ROWS) as one, Peer("follow", address, "a") as a:
            assert one.hear() == address
            with Peer("follow", address, "b") as b:
                for version in (1, 2):
                    for engine in (a, b):
                        engine.tell()
                    for source in (zero, one):
                        source.tell(version=version, engines=2)
                    assert sorted(zero.hear()) == sorted(one.hear()) == ["a", "b"]
                    assert a.hear() == b.hear() == [version, digests_of(make_model(version, ROWS))]


def test_a_publisher_killed_in_the_middle_of_staging_leaves_the_old_version() -> None:
    with Peer("publish", TCP, 0, 1, ROWS) as publisher:
        address = publisher.hear()
        with Middle(address) as middle, WeightSubscriber(middle.address, engine="e", limits=LIMITS) as subscriber:
            publisher.tell(version=1, engines=1)
            subscriber.wait(WAIT_S).commit()
            assert publisher.hear() == ["e"]
            # Two chunks of the second version pass, and no more: it is under way when the publisher dies.
            middle.alter = lambda index, header, body: [[header, body]] if index < 2 else []
            publisher.tell(version=2, engines=1)
            with pytest.raises(DeadlineExceeded, match=r"version 2 .* lacks \d+ chunks"):
                subscriber.wait(1.0)
            publisher.signal(signal.SIGKILL)
            publisher.process.wait()
            with pytest.raises(PeerLost, match=r"was silent .* while version 2 .* lacked .* goes on serving version 1"):
                subscriber.wait(WAIT_S)
            assert subscriber.serving is not None and subscriber.serving.number == 1
            middle.alter = pass_on
            with Peer("publish", address, 0, 1, ROWS) as successor:
                successor.hear()
                successor.tell(version=1, engines=1)
                update = subscriber.wait(WAIT_S)
                assert update.version > subscriber.serving and update.version.number == 1
                assert_same_bits(dict(update), make_model(1, ROWS))
                update.commit()
                assert successor.hear() == ["e"]


def test_a_stopped_engine_costs_bounded_memory_and_holds_nobody_up() -> None:
    rows = 300_000
    tensors = make_model(1, rows)
    model_bytes = sum(spec.num_bytes for spec in make_specs(tensors))
    policy = FleetPolicy.quorum(1)
    with (
        WeightPublisher(TensorSource(tensors), TCP, policy=policy, timeout_s=WAIT_S, lost_after_s=1.0) as publisher,
        Peer("follow", publisher.address, "stopped") as stopped,
        Peer("follow", publisher.address, "quick") as quick,
    ):
        publisher.wait_for_subscribers(2)
        for engine in (stopped, quick):
            engine.tell()
        publisher.publish(1)
        assert stopped.hear()[0] == quick.hear()[0] == 1
        before_bytes = psutil.Process().memory_info().rss
        stopped.signal(signal.SIGSTOP)
        for number in (2, 3, 4, 5):
            quick.tell()
            report = publisher.publish(number, timeout_s=5.0)
            assert "quick" in report.serving and "stopped" not in report.serving
            assert quick.hear()[0] == number
        grown_bytes = psutil.Process().memory_info().rss - before_bytes
        # One more snapshot may be held by the frames that the stopped engine did not read; not one a version.
        assert grown_bytes < 1.6 * model_bytes, f"{grown_bytes / model_bytes:.2f} models"
        stopped.signal(signal.SIGCONT)
        stopped.tell()
        assert stopped.hear() == [5, digests_of(tensors)]


def settle_bytes(process: psutil.Process) -> int:
    """Bytes that a process has, once they have stopped changing; of memory that two have, half counts."""
    time.sleep(0.2)
    return int(process.memory_full_info().pss)


@pytest.mark.parametrize("expose", [(), ("shared_memory",)])
def test_each_side_keeps_one_copy(expose: tuple[str, ...]) -> None:
    tensors = make_model(1, 1_200_000)
    model_bytes = sum(spec.num_bytes for spec in make_specs(tensors))
    assert model_bytes > 190e6
    with (
        WeightPublisher(TensorSource(tensors), TCP, timeout_s=3 * WAIT_S, expose=expose) as publisher,
        Peer("follow", publisher.address, "engine") as engine,
    ):
        publisher.wait_for_subscribers(1)
        process = psutil.Process(engine.process.pid)
        own_before, engine_before = settle_bytes(psutil.Process()), settle_bytes(process)
        for number in (1, 2, 3):
            engine.tell()
            publisher.publish(number)
            assert engine.hear()[0] == number
        own = (settle_bytes(psutil.Process()) - own_before) / model_bytes
        theirs = (settle_bytes(process) - engine_before) / model_bytes
    # What a source packs into is its own, or mapped by both: half of it counts on either side.
    shared = 0.5 if expose else 0.0
    assert own < 1.25 - shared, f"the source keeps {own:.2f} copies"
    assert theirs < 1.35 + shared, f"the engine keeps {theirs:.2f} copies"
