"""An engine worker's part in its host's share: it joins, receives or reads, and keeps its subscription supplied.

Who receives does so for all (`HostLeader` says which boxes); who reads takes its own out of that, or receives a version
by itself that was begun before its boxes were known.

    worker = HostWorker(subscription, address, HostShare("llama-8b"), reach, wake)
    effects = worker.step(now_s)        # after everything that happened to the subscription

`step` compares what the subscription needs with what the share has and does what is missing, so it does not matter in
which order things happened, nor who died meanwhile. It never waits: joining, taking memory and waiting for readers
are errands. All methods are called under the subscriber's lock.
"""

import logging
from collections.abc import Callable

from weightcast.sync.effects import Effect
from weightcast.sync.errors import DeadlineExceeded, PeerLost, ReachError, WeightcastError, WireError
from weightcast.sync.host.errand import Errand
from weightcast.sync.host.follower import HostFollower
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.lease import Lease
from weightcast.sync.host.pool import SharedPool
from weightcast.sync.host.share import HostShare, join_host_share
from weightcast.sync.messages import Announce
from weightcast.sync.part_plan import list_staged_specs
from weightcast.sync.regions import TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.shared_subscription import SharedSubscription
from weightcast.sync.union import is_within, list_carried
from weightcast.sync.version import fingerprint
from weightcast.sync.wanted import WantedRegions

logger = logging.getLogger(__name__)

# One try to join; between two of them it is seen whether somebody still wants to.
_JOIN_S = 10.0
# Beyond the leases' time, after which nobody reads any more.
_OVERWRITE_MARGIN_S = 5.0


class HostWorker:
    """See the module. `reach(announce)` chooses the ways to the sources and says why there is none to one of them."""

    def __init__(
        self,
        subscription: SharedSubscription,
        address: str,
        share: HostShare,
        reach: Callable[[Announce], str],
        wake: Callable[[], None],
    ) -> None:
        self._subscription = subscription
        self._address = address
        self._share = share
        self._reach = reach
        self._wake = wake
        self._specs: tuple[TensorSpec, ...] | None = None
        self._wanted: WantedRegions | None = None
        self._member: HostLeader | HostFollower | None = None
        self._previous: HostFollower | None = None
        self._joining: Errand[HostLeader | HostFollower] | None = None
        self._clearing: Errand[None] | None = None
        self._shadow = Shadow()
        self._pool: SharedPool | None = None  # that of the shadow, where it is the host's
        self._own: Shadow | None = None  # what this worker received by itself, beside a receiver
        self._is_enough = False  # whether what the host receives has all that this worker wants
        self._is_alone = False
        self._failure = ""
        self._leases: list[Lease] = []

    def sockets(self) -> list[HostFollower]:
        """What to wait for besides the subscriber's own sockets: they have a `fileno`."""
        return [self._member] if isinstance(self._member, HostFollower) else []

    def step(self, now_s: float) -> list[Effect]:
        """Do what is missing; returns what to tell the publisher and whom to ask."""
        self._return_leases()
        specs, wanted = self._subscription.shareable, self._subscription.model.wanted
        if specs is not self._specs or wanted is not self._wanted:
            # A publisher that is met again says the same in other words.
            if specs != self._specs or wanted != self._wanted:
                self._leave()
            self._specs, self._wanted = specs, wanted
        effects = self._end_joining() if self._joining is not None and self._joining.is_done else []
        effects += self._subscription.receive_for_others(isinstance(self._member, HostLeader), now_s)
        if isinstance(self._member, HostLeader):
            effects += self._lead(self._member, now_s)
        elif isinstance(self._member, HostFollower):
            effects += self._follow(self._member, now_s)
        elif self._is_alone:
            effects += self._receive(self._shadow, self._wanted, now_s)
        elif self._joining is None and self._specs is not None:
            effects += self._join()
        return effects

    def close(self) -> None:
        """Leave the share; when this worker received, another one takes over."""
        self._leave()
        for lease in self._leases:
            lease.give_up()

    # Leases

    def _note(self, lease: Lease) -> Lease:
        self._leases.append(lease)
        return lease

    def _return_leases(self) -> None:
        """Those of versions that were dropped, committed or rejected."""
        if why := self._subscription.drop_void():
            logger.warning("%s", why)
        held = self._subscription.leases
        for lease in self._leases:
            if not any(lease is other for other in held):
                lease.give_up()
        self._leases = list(held)

    # Joining and leaving

    def _join(self) -> list[Effect]:
        """Join, or after a failure refuse what is awaited and try again with the version after it."""
        assert self._specs is not None
        if self._failure and self._subscription.awaited is None:
            return []
        self._failure = ""
        self._subscription.waits_for = "its host's workers to agree which of them receives"
        # Models of other tensors have shares of their own, so that those who have not yet heard of a new one, after
        # its publisher was replaced, are in nobody's way.
        group = f"{self._share.group}\0{fingerprint(self._specs)}"
        specs, wanted, previous, share = self._specs, self._wanted, self._previous, self._share

        def join() -> HostLeader | HostFollower:
            while True:
                try:
                    return join_host_share(
                        self._address,
                        group,
                        specs,
                        timeout_s=_JOIN_S,
                        wanted=wanted,
                        lease_s=share.lease_s,
                        workers=share.workers,
                        gather_s=share.gather_s,
                        previous=previous,
                        base=share.base,
                    )
                except DeadlineExceeded:
                    if errand.is_abandoned:
                        raise

        self._joining = errand = Errand(join, self._wake)
        return []

    def _end_joining(self) -> list[Effect]:
        assert self._joining is not None
        errand, self._joining = self._joining, None
        engine = self._subscription.engine
        try:
            self._member = errand.result()
        except (WeightcastError, OSError) as error:
            if isinstance(error, WeightcastError) and not isinstance(error, ReachError):
                self._failure = f"engine {engine!r} has no part in its host's share {self._share.group!r}: {error}"
                return self._subscription.give_up(self._failure)
            logger.warning("engine %s receives by itself, not with the workers of its host: %s", engine, error)
            self._is_alone = True
            return []
        self._previous = None
        self._is_enough = self._member.has_pool and is_within(self._wanted, self._member.pool.wanted)
        if isinstance(self._member, HostLeader):
            if self._member.has_pool:
                self._pool = self._member.pool
                self._shadow = Shadow(self._pool, self._member.version)
            logger.info("engine %s receives for the share %s of its host", engine, self._share.group)
        else:
            logger.info("engine %s reads what process %d of its host receives", engine, self._member.leader_pid)
        return []

    def _leave(self) -> None:
        for errand in (self._joining, self._clearing):
            if errand is not None:
                errand.abandon()
        for member in (self._member, self._previous):
            if member is not None:
                member.close()
        self._joining = self._clearing = self._member = self._previous = None
        self._pool = self._own = None
        self._shadow, self._is_alone, self._is_enough, self._failure = Shadow(), False, False, ""

    # What each part does

    def _receive(
        self, shadow: Shadow, wanted: WantedRegions | None, now_s: float, *, must_lend: bool = False
    ) -> list[Effect]:
        """Fetch these boxes of what is awaited, into memory that may be written."""
        awaited = self._subscription.awaited
        if awaited is None:
            return []
        if refusal := self._reach(awaited):
            return self._subscription.give_up(refusal)
        self._subscription.model.receive(wanted)
        return self._subscription.stage(shadow, now_s, must_lend=must_lend)

    def _lead(self, leader: HostLeader, now_s: float) -> list[Effect]:
        subscription = self._subscription
        effects = self._end_clearing(leader)
        if subscription.refused is not None:
            if subscription.shadow is not self._own:
                leader.refuse(subscription.refused.version, subscription.refused.reason)
            subscription.refused = None
        arrival = subscription.arrival
        if arrival is None:
            return effects
        if arrival.is_staged:
            if subscription.awaits_lease:
                leader.finish_overwrite(arrival.version)
                lease = leader.take()
                assert lease is not None, "what was just staged is on offer"
                effects += subscription.lend(self._note(lease))
            return effects
        if subscription.awaited is None:
            return effects
        if leader.is_overwriting and self._clearing is None:
            return effects + self._receive(self._shadow, leader.pool.wanted, now_s, must_lend=True)
        # After a takeover the version may be there already.
        if self._is_enough and leader.version == arrival.version and (lease := leader.take()) is not None:
            return effects + subscription.adopt(self._note(lease), now_s)
        if self._clearing is None:
            self._own = None
            subscription.waits_for = (
                f"the workers of this host that still load version {leader.version}"
                if leader.has_pool
                else "other workers of this host, which may want more of it"
            )
            patience_s = self._share.lease_s + _OVERWRITE_MARGIN_S
            self._clearing = Errand(lambda: leader.begin_overwrite(patience_s), self._wake)
        return effects

    def _end_clearing(self, leader: HostLeader) -> list[Effect]:
        if self._clearing is None or not self._clearing.is_done:
            return []
        errand, self._clearing = self._clearing, None
        engine = self._subscription.engine
        try:
            errand.result()
        except (DeadlineExceeded, PeerLost) as error:
            logger.warning("engine %s: %s; it is tried again", engine, error)
            return []
        except OSError as error:
            return self._subscription.give_up(f"engine {engine!r} cannot receive for its host: {error}")
        if leader.pool is not self._pool:
            before, self._pool, self._is_enough = self._pool, leader.pool, True
            self._shadow = Shadow(self._pool) if before is None else self._move_shadow(before, self._pool)
        return []

    def _move_shadow(self, before: SharedPool, pool: SharedPool) -> Shadow:
        """The shadow for the boxes that are received from now on, with what is known of those before."""
        model = self._subscription.model
        assert self._specs is not None
        specs = list_staged_specs(self._specs, pool.wanted)
        try:
            carried = list_carried(model.layouts, model.plan_for(before.wanted), model.plan_for(pool.wanted))
            return self._shadow.moved(pool, model.layouts, specs, carried)
        except WireError:  # of layouts: then no version can be received anyway
            return Shadow(pool)

    def _follow(self, follower: HostFollower, now_s: float) -> list[Effect]:
        subscription = self._subscription
        awaited, subscription.refused = subscription.awaited, None
        subscription.waits_for = f"process {follower.leader_pid}, which receives for this host"
        try:
            lease = follower.take(awaited.version if awaited is not None and self._is_enough else None)
        except WeightcastError as error:  # it died, left, receives into other memory, or makes no sense
            logger.info("engine %s: %s; this worker joins again", subscription.engine, error)
            self._previous, self._member = follower, None
            return self._join()
        if awaited is None:
            return []
        if lease is not None:
            return subscription.adopt(self._note(lease), now_s)
        if not self._is_enough and follower.version == awaited.version:
            # It came after the others; the version after this one is received for it too.
            logger.info("engine %s receives version %s by itself", subscription.engine, awaited.version)
            self._own = Shadow()
            return self._receive(self._own, self._wanted, now_s)
        refused = follower.refused
        if refused is not None and refused.version == awaited.version:
            return subscription.give_up(
                f"process {follower.leader_pid}, which receives for engine {subscription.engine!r} and others of its "
                f"host, refused version {awaited.version}: {refused.reason}"
            )
        return []
