"""A worker that reads what another of its host has received."""

import selectors
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from weightcast.sync.errors import DeadlineExceeded, PeerLost, WireError
from weightcast.sync.host.lease import Lease
from weightcast.sync.host.leases import FollowerState
from weightcast.sync.host.packets import Connection
from weightcast.sync.host.pool import SharedPool, Staged
from weightcast.sync.host.server import close_in_children
from weightcast.sync.host.share_messages import (
    KINDS,
    TO_FOLLOWER,
    Denied,
    GiveBack,
    Granted,
    Moved,
    Offered,
    Refused,
    Withdrawn,
)
from weightcast.sync.version import Version


class HostFollower:
    """Made by `join_host_share`; to be used by one thread.

        lease = follower.wait(after=serving, timeout_s=60)     # or poll(), whenever fileno() is readable

    Both raise `PeerLost` when the leader died, closed, or receives into other memory from now on: join again, with this
    one as `previous`. A lease that is held then stays good, for nobody writes its memory any more. There is no `pool`
    before the first version is to be received.
    """

    is_leader = False

    def __init__(self, connection: Connection, pool: SharedPool | None, offered: Staged | None) -> None:
        self._pool = pool
        self._connection = connection
        self._state = FollowerState(offered)
        self._is_leased = False
        close_in_children(self)

    @property
    def pool(self) -> SharedPool:
        """What the leader writes."""
        assert self._pool is not None, "nothing was received yet"
        return self._pool

    @property
    def has_pool(self) -> bool:
        """Whether there is one."""
        return self._pool is not None

    @property
    def version(self) -> Version | None:
        """What the leader offered when it was last heard, or None."""
        return None if self._state.offered is None else self._state.offered.version

    def fileno(self) -> int:
        """For a poller: readable when `poll` has something to do."""
        return self._connection.fileno()

    def poll(self, after: Version | None = None) -> Lease | None:
        """A lease on a version later than `after` (any, when None) if there is one now; never waits.

        Getting one takes an answer of the leader, so the first call may return None and a later one the lease.
        """
        assert not self._is_leased, "release the lease before the next one"
        return self._poll(lambda version: after is None or version > after)

    def take(self, version: Version | None) -> Lease | None:
        """As `poll`, a lease on just this version, or on none. With a lease out it only hears what the leader says."""
        return self._poll(lambda offered: offered == version)

    @property
    def refused(self) -> Refused | None:
        """What the leader said last that it will not have, and why."""
        return self._state.refused

    @property
    def leader_pid(self) -> int:
        """The process that receives."""
        pid: int = self._connection.pid
        return pid

    def _poll(self, is_wanted: Callable[[Version], bool]) -> Lease | None:
        while (message := self._receive()) is not None:
            self._state.hear(message)
        if self._is_leased:
            return None
        granted = self._state.granted
        if granted is not None and not is_wanted(granted.version):
            self._give_up()
            granted = None
        if (request := self._state.ask(is_wanted)) is not None:
            self._connection.send(KINDS[type(request)], request)
        if granted is None:
            return None
        self._is_leased = True
        return Lease(self.pool, granted, self._give_back)

    def wait(self, after: Version | None = None, *, timeout_s: float) -> Lease:
        """A lease on a version later than `after` (any, when None). Raises `DeadlineExceeded`, `PeerLost`."""
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            while (lease := self.poll(after)) is None:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    self._give_up()
                    raise DeadlineExceeded(
                        f"process {self._connection.pid}, which receives for this host, staged no version later than "
                        f"{after} within {timeout_s:.1f} s; see its log, or wait longer"
                    )
        return lease

    def close(self) -> None:
        """Leave. The memory goes with the last tensor on it."""
        self._connection.close()

    def close_descriptors(self) -> None:
        """In a forked child: its copy would hide this process's end from the leader."""
        self._connection.close()

    def _receive(self) -> Offered | Withdrawn | Refused | Granted | Denied | None:
        try:
            message, descriptor = self._connection.receive(TO_FOLLOWER, 0)
        except DeadlineExceeded:
            return None
        if isinstance(message, Moved):
            raise PeerLost(f"process {self.leader_pid} receives into other memory from now on; join it again")
        if descriptor is not None or not isinstance(message, Offered | Withdrawn | Refused | Granted | Denied):
            raise WireError(f"the leader sent {type(message).__name__}, which it must not now")
        return message

    def _give_up(self) -> None:
        if self._state.give_up():
            self._tell_back()

    def _give_back(self) -> None:
        self._is_leased = False
        self._state.give_up()
        self._tell_back()

    def _tell_back(self) -> None:
        with suppress(PeerLost):  # the next poll says so
            message: Any = GiveBack()
            self._connection.send(KINDS[GiveBack], message)
