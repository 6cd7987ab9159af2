"""Engine workers in processes of their own that want slices each of their host's copy, some of which are killed."""

import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tests.sync.middle import Middle, pass_on
from tests.sync.parts import WAIT_S, TensorSource, bits, make_specs
from tests.sync.share_peer import NUM_RANKS, SharePeer
from tests.sync.slice_wants import digests_of, make_layers, slices_of

from weightcast.sync import FleetPolicy, PublishReport, WeightPublisher
from weightcast.sync.cut_source import cut_source

# Python and torch, several times at once, on a machine that has other work.
START_S = 240.0


class Fleet:
    """A publisher whose slices the workers take by rank, through `middle`."""

    def __init__(self, stack: ExitStack, base: Path) -> None:
        self.tensors = make_layers(1, 640)
        self.specs = tuple(make_specs(self.tensors))
        wants = [slices_of(rank, NUM_RANKS)(self.specs) for rank in range(NUM_RANKS)]
        publisher = WeightPublisher(
            cut_source(TensorSource(self.tensors), wants),
            "tcp://127.0.0.1:0",
            policy=FleetPolicy.all(1),
            delta="on",
            chunk_bytes=1 << 16,
            timeout_s=3 * WAIT_S,
            expose=(),
        )
        self.publisher = stack.enter_context(publisher)
        self.middle = stack.enter_context(Middle(publisher.address))
        self.workers: dict[int, SharePeer] = {}
        self._stack, self._base = stack, base

    def start(self, *ranks: int) -> None:
        """Workers of these ranks, at once; they are there when this returns.

        Whichever of them receives expects as many as the engine has, also one that came again.
        """
        for rank in ranks:
            peer = SharePeer(self.middle.address, f"w{rank}", self._base, rank, NUM_RANKS)
            self.workers[rank] = self._stack.enter_context(peer)
        self.publisher.wait_for_subscribers(len(self.workers), START_S)

    def change(self) -> None:
        """Other bits in a few elements."""
        for tensor in self.tensors.values():
            bits(tensor)[::211] ^= 1

    def expect(self, rank: int) -> list[int]:
        """The digests of its boxes."""
        return digests_of(self.tensors, slices_of(rank, NUM_RANKS)(self.specs))

    def take(self, number: int) -> None:
        """Each worker serves this version, and has its boxes of it."""
        for worker in self.workers.values():
            worker.tell(do="serve", count=1)
        for rank, worker in self.workers.items():
            assert worker.hear()[:2] == [number, self.expect(rank)]

    def publish(self, number: int) -> PublishReport:
        """Publish, with other bits; one receives, the others read."""
        self.change()
        publication = self.publisher.begin(number)
        self.take(number)
        report = publication.wait()
        transports = sorted(engine.transport for engine in report.engines if engine.state == "serving")
        assert transports == ["host"] * (len(self.workers) - 1) + ["zmq"]
        return report

    def kill_receiver(self, report: PublishReport) -> None:
        """Of the report's version."""
        (name,) = report.receiving
        self.workers.pop(int(name[1:])).kill()


def test_the_receiver_killed_between_versions_and_amid_one(base: Path) -> None:
    with ExitStack() as stack:
        fleet = Fleet(stack, base)
        torch.set_num_threads(1)
        fleet.start(0, 1, 2, 3)
        report = fleet.publish(1)
        assert report.num_bytes == report.dense_bytes, "each byte once"
        fleet.kill_receiver(report)
        gone = {*range(NUM_RANKS)} - fleet.workers.keys()
        report = fleet.publish(2)
        assert report.num_bytes < report.dense_bytes / 4, "a delta, on what was carried over"
        fleet.start(*gone)
        (again,) = gone
        # What it wants is received still, or by itself: it gets the version that there is.
        assert fleet.workers[again].do("serve", count=1)[:2] == [2, fleet.expect(again)]
        time.sleep(0.5)
        report = fleet.publish(3)
        assert report.num_bytes < report.dense_bytes / 2
        # Some chunks of the fourth version pass, and no more: it is under way when the receiver dies.
        fleet.middle.alter = lambda index, header, body: [[header, body]] if index < 2 else []
        fleet.change()
        publication = fleet.publisher.begin(4)
        time.sleep(1.0)
        assert all(engine.staged is None or engine.staged.number == 3 for engine in fleet.publisher.fleet())
        fleet.kill_receiver(report)
        fleet.middle.alter = pass_on
        fleet.take(4)
        assert sorted(publication.wait().serving) == sorted(worker.name for worker in fleet.workers.values())
        report = fleet.publish(5)
        assert report.num_bytes < report.dense_bytes / 4
