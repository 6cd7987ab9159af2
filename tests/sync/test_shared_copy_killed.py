"""Engine workers in processes of their own that share their host's copy, some of which are killed, and their memory."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sync.middle import Middle, pass_on
from tests.sync.parts import WAIT_S, TensorSource, make_model, make_specs
from tests.sync.share_peer import SharePeer

from weightcast.sync import FleetPolicy, PublishReport, WeightPublisher
from weightcast.sync.digest import region_digest

TCP = "tcp://127.0.0.1:0"
ROWS = 5000
CHUNK_BYTES = 65536
# Python and torch, several times at once, on a machine that has other work.
START_S = 240.0
Start = Callable[[str, str], SharePeer]


@pytest.fixture
def start(base: Path) -> Iterator[Start]:
    """Starts workers, which end with the test."""
    with ExitStack() as stack:
        yield lambda address, name: stack.enter_context(SharePeer(address, name, base))


def make_publisher(tensors: dict[str, torch.Tensor], policy: FleetPolicy, **settings: Any) -> WeightPublisher:
    """Whose workers fetch deltas over connections."""
    defaults: dict[str, Any] = {"delta": "on", "chunk_bytes": CHUNK_BYTES, "timeout_s": 3 * WAIT_S, "expose": ()}
    return WeightPublisher(TensorSource(tensors), TCP, policy=policy, **defaults | settings)


def change(tensors: dict[str, torch.Tensor], number: int) -> list[int]:
    """Other bits in a few elements; the digest of each tensor."""
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8)[number % 7 :: 211] ^= 1
    return digests_of(tensors)


def digests_of(tensors: dict[str, torch.Tensor]) -> list[int]:
    """Of each tensor."""
    return [region_digest(tensors[spec.name], spec.whole()) for spec in make_specs(tensors)]


def publish(publisher: WeightPublisher, number: int, workers: list[SharePeer], digests: list[int]) -> PublishReport:
    """Publish, and let the workers take and commit it: each must have these digests."""
    for worker in workers:
        worker.tell(do="serve", count=1)
    report = publisher.publish(number)
    lines = [worker.hear() for worker in workers]
    assert [line[:2] for line in lines] == [[number, digests]] * len(workers)
    assert {worker.name: line[2] for worker, line in zip(workers, lines, strict=True)} == {
        engine.engine: engine.transport for engine in report.engines if engine.state == "serving"
    }
    return report


def receiver_of(report: PublishReport, workers: list[SharePeer]) -> SharePeer:
    """The one worker that received; the others read."""
    names = [engine.engine for engine in report.engines if engine.transport == "zmq"]
    assert len(names) == 1 and sum(engine.transport == "host" for engine in report.engines) == len(workers) - 1
    return next(worker for worker in workers if worker.name == names[0])


def test_the_receiver_killed_between_versions_and_a_reader_under_its_lease(start: Start) -> None:
    tensors = make_model(1, ROWS)
    with make_publisher(tensors, FleetPolicy.all(1)) as publisher:
        workers = [start(publisher.address, f"w{number}") for number in range(4)]
        publisher.wait_for_subscribers(4, START_S)
        digests = digests_of(tensors)
        for number in (1, 2, 3):
            digests = change(tensors, number)
            report = publish(publisher, number, workers, digests)
            assert number == 1 or report.num_bytes < report.dense_bytes / 4
        receiver = receiver_of(report, workers)
        workers.remove(receiver)
        receiver.kill()
        late = start(publisher.address, "late")
        publisher.wait_for_subscribers(4, START_S)
        assert late.do("serve", count=1)[:2] == [3, digests], "what was carried over is on offer again"
        workers.append(late)
        digests = change(tensors, 4)
        report = publish(publisher, 4, workers, digests)
        assert report.num_bytes < report.dense_bytes / 4, "a delta, on what was carried over"
        receiver = receiver_of(report, workers)
        reader = next(worker for worker in workers if worker is not receiver)
        # It takes version 5 and dies over it, with its lease.
        digests = change(tensors, 5)
        publication = publisher.begin(5)
        assert reader.do("take")[:2] == [5, digests]
        reader.kill()
        workers.remove(reader)
        for worker in workers:
            assert worker.do("serve", count=1)[:2] == [5, digests]
        assert sorted(publication.wait().serving) == sorted(worker.name for worker in workers)
        start_s = time.monotonic()
        digests = change(tensors, 6)
        publish(publisher, 6, workers, digests)
        assert time.monotonic() - start_s < 20, "less than a lease"


def test_the_receiver_killed_in_the_middle_of_staging(start: Start) -> None:
    tensors = make_model(1, ROWS)
    with make_publisher(tensors, FleetPolicy.all(1)) as publisher, Middle(publisher.address) as middle:
        workers = [start(middle.address, f"w{number}") for number in range(4)]
        publisher.wait_for_subscribers(4, START_S)
        receiver = receiver_of(publish(publisher, 1, workers, change(tensors, 1)), workers)
        # Some chunks of the second version pass, and no more: it is under way when the receiver dies.
        middle.alter = lambda index, header, body: [[header, body]] if index < 3 else []
        digests = change(tensors, 2)
        publication = publisher.begin(2)
        time.sleep(1.0)
        states = {engine.engine: engine.staged for engine in publisher.fleet()}
        assert all(staged is None or staged.number == 1 for staged in states.values()), states
        receiver.kill()
        workers.remove(receiver)
        middle.alter = pass_on
        for worker in workers:
            assert worker.do("serve", count=1)[:2] == [2, digests]
        report = publication.wait()
        assert sorted(report.serving) == sorted(worker.name for worker in workers)
        assert [engine.transport for engine in report.engines if engine.state == "serving"].count("host") == 2
        # A torn copy is nothing that a delta begins from; the next version has one again.
        assert report.num_bytes > report.dense_bytes / 2
        report = publish(publisher, 3, workers, change(tensors, 3))
        assert report.num_bytes < report.dense_bytes / 4


def test_a_stopped_receiver_is_waited_for_by_name_and_others_go_on_when_it_is_killed(start: Start) -> None:
    tensors = make_model(1, ROWS)
    with make_publisher(tensors, FleetPolicy.all(1), lost_after_s=4.0) as publisher:
        workers = [start(publisher.address, f"w{number}") for number in range(2)]
        publisher.wait_for_subscribers(2, START_S)
        receiver = receiver_of(publish(publisher, 1, workers, change(tensors, 1)), workers)
        (reader,) = (worker for worker in workers if worker is not receiver)
        receiver.signal(signal.SIGSTOP)
        digests = change(tensors, 2)
        publication = publisher.begin(2)
        answer = reader.do("take", timeout_s=2.0)
        assert answer["error"] == "DeadlineExceeded"
        assert f"waits for process {receiver.process.pid}, which receives for this host" in answer["text"]
        receiver.kill()
        assert reader.do("serve", count=1) == [2, digests, "zmq"]
        assert publication.wait().serving == (reader.name,)


def test_a_reader_takes_no_memory_of_its_own(start: Start) -> None:
    tensors = make_model(1, 1_000_000)
    model_bytes = sum(spec.num_bytes for spec in make_specs(tensors))
    assert model_bytes > 160e6
    with make_publisher(tensors, FleetPolicy.all(), chunk_bytes=4 << 20) as publisher:
        workers = [start(publisher.address, f"w{number}") for number in range(3)]
        publisher.wait_for_subscribers(3, START_S)
        before = {worker.name: worker.do("memory") for worker in workers}
        digests = digests_of(tensors)
        for number in (1, 2):
            report = publish(publisher, number, workers, digests)
        receiver = receiver_of(publish(publisher, 3, workers, digests), workers)
        after = {worker.name: worker.do("memory") for worker in workers}
        assert report.num_tensors == len(tensors)

    def grown(name: str, *kinds: str) -> float:
        return float(sum(after[name][kind] - before[name][kind] for kind in kinds) / model_bytes)

    for worker in workers:
        private = grown(worker.name, "Private_Clean", "Private_Dirty")
        assert private < 0.25, f"{worker.name} took {private:.2f} models of its own"
        assert worker is receiver or grown(worker.name, "Rss") < 1.3, "the model once, and shared"
    total = sum(grown(worker.name, "Pss") for worker in workers)
    assert total < 1.5, f"three workers together took {total:.2f} models"
