"""The simulated fleet as workers of one host: real shares, memory and errands; the rest without sockets or clocks.

What happens between two steps of a worker is the test's choice, also that its engine takes a version before the worker
has looked at it.
"""

import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import torch
from tests.sync.parts import WAIT_S
from tests.sync.simulated_trainer import NUM_SOURCES, SPECS
from tests.sync.simulation import LIMITS, SimulatedEngine, World

from weightcast.sync import FleetPolicy, HostShare
from weightcast.sync.arrival import Arrival
from weightcast.sync.host.errand import Errand
from weightcast.sync.host.worker import HostWorker
from weightcast.sync.packer import PackMode
from weightcast.sync.shared_subscription import SharedSubscription
from weightcast.sync.wanted import WantedRegions

# What most errands take that wait for no reader; one that does is looked at again with the next step.
ERRAND_S = 0.01
_POLL_S = 0.0005
_TURN_S = 0.002


def first_storage(tensors: Mapping[str, torch.Tensor]) -> int:
    """Where the memory begins in which the first of them lies."""
    return next(iter(tensors.values())).untyped_storage().data_ptr()


class HostWorld(World):
    """See the module. `lease_s` is real time; engines of `preparing` look at a version before the fleet hears of it."""

    def __init__(
        self,
        policy: FleetPolicy,
        mode: PackMode,
        base: Path,
        lease_s: float,
        wants: Mapping[str, WantedRegions],
        preparing: Set[str],
    ) -> None:
        super().__init__(policy, mode)
        self.wants, self._preparing = dict(wants), preparing
        self._share = HostShare("engine", base=base, lease_s=lease_s, gather_s=0.0)
        self.workers: dict[str, HostWorker] = {}

    def start_engine(self, name: str) -> None:
        """A new process of this name; one that ran is gone, and its share with it."""
        if name in self.workers:
            self.workers[name].close()
        subscription = SharedSubscription(name, SPECS, LIMITS, 0.0)
        subscription.model.want = self.wants.get(name)
        subscription.prepares = name in self._preparing
        self.engines[name] = SimulatedEngine(name, subscription, self._new_peer())
        self.workers[name] = HostWorker(subscription, "simulated", self._share, lambda _: "", lambda: None)
        self.do(self.engines[name], subscription.hello())

    def step_worker(self, engine: SimulatedEngine) -> None:
        """Its thread looks at what there is to do, once errands that can end have ended."""
        worker, end_s = self.workers[engine.name], time.monotonic() + ERRAND_S
        errands: list[Errand[object] | None] = [worker._joining, worker._clearing]  # type: ignore[list-item]
        while any(errand is not None and not errand.is_done for errand in errands) and time.monotonic() < end_s:
            time.sleep(_POLL_S)
        self.do(engine, worker.step(self.now_s))

    def check_take(self, engine: SimulatedEngine) -> bool:
        """As for every engine; and what all workers read it has under a lease, not to be written."""
        subscription, arrival = engine.subscription, engine.subscription.arrival
        if arrival is not None and arrival.is_readable and arrival.waits_for_engine and subscription.taken is None:
            self._check_readable(engine, arrival)
            arrival.waits_for_engine = False
            self.do(engine, subscription.tell_staged())
        if not super().check_take(engine):
            return False
        self._check_readable(engine, subscription.taken)
        return True

    def _check_readable(self, engine: SimulatedEngine, arrival: Arrival | None) -> None:
        pool = self.workers[engine.name]._pool
        assert arrival is not None and arrival.tensors is not None
        if pool is not None:
            ours, theirs = (first_storage(tensors) for tensors in (arrival.tensors, pool.tensors))
            assert ours != theirs, f"{engine.name} reads version {arrival.version} where it is written"

    def check_held(self, engine: SimulatedEngine) -> None:
        """What an engine loads is as it was when it took it, or its lease says that it is not."""
        taken = engine.subscription.taken
        if taken is None or (taken.lease is not None and taken.lease.is_void):
            return
        assert taken.tensors is not None
        self.check_bits(engine, taken.version, taken.tensors)

    def settle(self, is_over: Callable[[], bool], seconds: float) -> None:
        """No more faults, until `is_over` or for so long; a turn is a part of a second, and gives real threads time."""
        end_s, real_end_s = self.now_s + seconds, time.monotonic() + WAIT_S
        while not is_over() and self.now_s < end_s:
            assert time.monotonic() < real_end_s, [engine.subscription.describe() for engine in self.engines.values()]
            time.sleep(_TURN_S)
            for rank in range(NUM_SOURCES):
                self.send(self.trainer.pack(rank, 100, self.now_s))
            self.advance(0.3)
            for engine in self.engines.values():
                if engine.subscription.taken is not None:
                    self.commit(engine)
                for _ in range(25):
                    self.deliver_up(engine)
                    self.note_release()
                    self.deliver_down(engine)
                    self.deliver_chunk(engine)
                self.step_worker(engine)
                if self.check_take(engine):
                    self.commit(engine)
                self.step_worker(engine)

    def close(self) -> None:
        """End of all shares."""
        for worker in self.workers.values():
            worker.close()
