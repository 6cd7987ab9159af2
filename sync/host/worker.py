"""An engine worker's part in its host's share: it joins, receives or reads, and keeps its subscription supplied.

    worker = HostWorker(subscription, address, HostShare("llama-8b"), reach, wake)
    effects = worker.step(now_s)        # after everything that happened to the subscription

`step` compares what the subscription needs with what the share has and does what is missing, so it does not matter in
which order things happened, nor who died meanwhile. It never waits: joining, taking memory and waiting for readers
are errands. All methods are called under the subscriber's lock.
"""

import logging
from collections.abc import Callable

from weightcast.sync.effects import Effect
from weightcast.sync.errors import DeadlineExceeded, PeerLost, ReachError, WeightcastError
from weightcast.sync.host.errand import Errand
from weightcast.sync.host.follower import HostFollower
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.lease import Lease
from weightcast.sync.host.share import HostShare, join_host_share
from weightcast.sync.messages import Announce
from weightcast.sync.regions import TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.shared_subscription import SharedSubscription
from weightcast.sync.version import fingerprint

logger = logging.getLogger(__name__)

# One try to join; between two of them it is seen whether somebody still wants to.
_JOIN_S = 2.0
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
        self._member: HostLeader | HostFollower | None = None
        self._previous: HostFollower | None = None
        self._joining: Errand[HostLeader | HostFollower] | None = None
        self._clearing: Errand[None] | None = None
        self._shadow = Shadow()
        self._is_alone = False
        self._failure = ""
        self._leases: list[Lease] = []

    def sockets(self) -> list[HostFollower]:
        """What to wait for besides the subscriber's own sockets: they have a `fileno`."""
        return [self._member] if isinstance(self._member, HostFollower) else []

    def step(self, now_s: float) -> list[Effect]:
        """Do what is missing; returns what to tell the publisher and whom to ask."""
        self._return_leases()
        specs = self._subscription.shareable
        if specs is not self._specs:  # a publisher that is met again says the same in other words
            if specs != self._specs:
                self._leave()
            self._specs = specs
        effects = self._end_joining() if self._joining is not None and self._joining.is_done else []
        effects += self._subscription.receive_for_others(isinstance(self._member, HostLeader), now_s)
        if isinstance(self._member, HostLeader):
            effects += self._lead(self._member, now_s)
        elif isinstance(self._member, HostFollower):
            effects += self._follow(self._member, now_s)
        elif self._is_alone:
            effects += self._receive(now_s)
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
        specs, previous = self._specs, self._previous

        def join() -> HostLeader | HostFollower:
            while True:
                try:
                    return join_host_share(
                        self._address,
                        group,
                        specs,
                        timeout_s=_JOIN_S,
                        lease_s=self._share.lease_s,
                        previous=previous,
                        base=self._share.base,
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
        if isinstance(self._member, HostLeader):
            self._shadow = Shadow(self._member.pool, self._member.version)
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
        self._shadow, self._is_alone, self._failure = Shadow(), False, ""

    # What each part does

    def _receive(self, now_s: float) -> list[Effect]:
        """Fetch what is awaited, into memory that may be written."""
        awaited = self._subscription.awaited
        if awaited is None:
            return []
        refusal = self._reach(awaited)
        return self._subscription.give_up(refusal) if refusal else self._subscription.stage(self._shadow, now_s)

    def _lead(self, leader: HostLeader, now_s: float) -> list[Effect]:
        subscription = self._subscription
        self._end_clearing()
        if subscription.refused is not None:
            leader.refuse(subscription.refused.version, subscription.refused.reason)
            subscription.refused = None
        arrival = subscription.arrival
        if arrival is None:
            return []
        if arrival.is_staged:
            if arrival.lease is None:
                leader.finish_overwrite(arrival.version)
                lease = leader.take()
                assert lease is not None, "what was just staged is on offer"
                subscription.lend(self._note(lease))
            return []
        if subscription.awaited is None:
            return []
        if leader.is_overwriting:
            return self._receive(now_s)
        # After a takeover the version may be there already.
        if leader.version == arrival.version and (lease := leader.take()) is not None:
            return subscription.adopt(self._note(lease), now_s)
        if self._clearing is None:
            subscription.waits_for = f"the workers of this host that still load version {leader.version}"
            patience_s = self._share.lease_s + _OVERWRITE_MARGIN_S
            self._clearing = Errand(lambda: leader.begin_overwrite(patience_s), self._wake)
        return []

    def _end_clearing(self) -> None:
        if self._clearing is None or not self._clearing.is_done:
            return
        errand, self._clearing = self._clearing, None
        try:
            errand.result()
        except (DeadlineExceeded, PeerLost) as error:
            logger.warning("engine %s: %s; it is tried again", self._subscription.engine, error)

    def _follow(self, follower: HostFollower, now_s: float) -> list[Effect]:
        subscription = self._subscription
        awaited, subscription.refused = subscription.awaited, None
        subscription.waits_for = f"process {follower.leader_pid}, which receives for this host"
        try:
            lease = follower.take(None if awaited is None else awaited.version)
        except WeightcastError as error:  # it died, left, or makes no sense
            logger.info("engine %s: %s; another worker of the host takes over", subscription.engine, error)
            self._previous, self._member = follower, None
            return self._join()
        if awaited is None:
            return []
        if lease is not None:
            return subscription.adopt(self._note(lease), now_s)
        refused = follower.refused
        if refused is not None and refused.version == awaited.version:
            return subscription.give_up(
                f"process {follower.leader_pid}, which receives for engine {subscription.engine!r} and others of its "
                f"host, refused version {awaited.version}: {refused.reason}"
            )
        return []
