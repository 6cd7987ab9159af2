"""A subscription whose versions are received once for several engine workers of a host. Pure, as the one it extends.

    idle -> awaited -> (staged by this worker | lent by the one that receives) -> ready -> ...

What is announced is awaited until the worker's part is known: `stage` when this one receives, `adopt` when another
one's copy is there. To the publisher every worker is a receiver of its own. `host/worker.py` carries it out.
"""

from collections.abc import Sequence

from weightcast.sync.arrival import Arrival
from weightcast.sync.effects import Effect
from weightcast.sync.errors import WeightcastError
from weightcast.sync.host.lease import Lease
from weightcast.sync.limits import Limits
from weightcast.sync.messages import Announce, Failed
from weightcast.sync.regions import TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.subscription import Subscription
from weightcast.sync.version import Version


class SharedSubscription(Subscription):
    """See the module. Of a receiver, since an observer has nothing to share."""

    def __init__(self, engine: str, expect: Sequence[TensorSpec] | None, limits: Limits, wall_offset_s: float) -> None:
        super().__init__(engine, "receiver", expect, limits, wall_offset_s)
        self._receives_for_others = False
        self.waits_for = "a publisher's model"
        """Whom an awaited version waits for, in words."""
        self.refused: Failed | None = None
        """What was refused last, and why."""

    @property
    def shareable(self) -> tuple[TensorSpec, ...] | None:
        """The tensors that this worker may share, some boxes of them or all; None while it can take no version."""
        return None if self.model.error is not None or self.is_dismissed else self.model.specs

    @property
    def awaited(self) -> Announce | None:
        """What was announced, and is neither here nor on its way by this worker's doing."""
        arrival = self.arrival
        return arrival.announce if arrival is not None and arrival.staging is None and not arrival.is_staged else None

    @property
    def leases(self) -> tuple[Lease, ...]:
        """The leases on what is staged, and on what the engine loads."""
        return tuple(held.lease for held in (self.arrival, self.taken) if held is not None and held.lease is not None)

    def describe(self) -> str:
        """In one sentence, where this subscription is."""
        awaited = self.awaited
        return super().describe() if awaited is None else f"version {awaited.version} waits for {self.waits_for}"

    def _must_wait(self, version: Version) -> bool:
        is_next = self.taken is not None and version > self.taken.version
        return super()._must_wait(version) and not (self._receives_for_others and is_next)

    def _begin(self, announce: Announce, now_s: float) -> list[Effect]:
        self.error = None
        self.arrival = Arrival(announce, None, 0, self._limits, now_s, waits_for_engine=self.prepares)
        return []

    def _refuse(self, version: Version, error: WeightcastError) -> list[Effect]:
        self.refused = Failed(version, str(error))
        return super()._refuse(version, error)

    # What the worker's part turns out to be

    def receive_for_others(self, is_receiver: bool, now_s: float) -> list[Effect]:
        """Whether this worker receives for its host: then a version does not wait until its own engine is done."""
        self._receives_for_others = is_receiver
        waiting = self._waiting
        if waiting is None or self._must_wait(waiting.version):
            return []
        self._waiting = None
        return self._announced(waiting, now_s)

    def stage(self, shadow: Shadow, now_s: float, *, must_lend: bool) -> list[Effect]:
        """Fetch what is awaited into `shadow`, whose memory may be written; what of it says `ModelView.receive`.

        Where that is the host's the version `must_lend`: neither engine nor fleet hears of it before `lend`.
        """
        arrival = self.arrival
        assert arrival is not None and self.awaited is not None
        self.shadow = shadow
        return self._stage(arrival.announce, arrival.started_s, now_s, must_lend=must_lend)

    @property
    def awaits_lease(self) -> bool:
        """Whether a version is staged in memory that is shared, and `lend` is due."""
        return self.arrival is not None and self.arrival.is_staged and not self.arrival.is_readable

    def lend(self, lease: Lease) -> list[Effect]:
        """What this worker has staged lies in memory that it shares: its engine reads it under a lease as all do."""
        assert self.awaits_lease and self.arrival is not None and lease.version == self.arrival.version
        self.arrival.tensors, self.arrival.lease = self.model.present(lease.tensors, lease.wanted), lease
        return self.tell_staged()

    def adopt(self, lease: Lease, now_s: float) -> list[Effect]:
        """The awaited version is there, staged and checked by the worker that receives."""
        arrival = self.arrival
        assert arrival is not None and self.awaited is not None and lease.version == arrival.version
        assert self.model.specs is not None
        arrival.specs, arrival.staged_s = self.model.specs, now_s
        # What this worker received by itself before is of no more use.
        self.shadow = Shadow()
        arrival.tensors, arrival.lease = self.model.present(lease.tensors, lease.wanted), lease
        return self.tell_staged()

    def drop_void(self) -> str:
        """Drop what is staged here when it was overwritten meanwhile: this worker has not heard of the next version.

        Returns why, or nothing.
        """
        arrival = self.arrival
        if arrival is None or arrival.lease is None or not arrival.lease.is_void:
            return ""
        if arrival.is_prepared and not arrival.tensors:  # the engine has read them
            return ""
        self.arrival = None
        return f"version {arrival.version} was overwritten before engine {self.engine!r} took it"
