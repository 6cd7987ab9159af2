"""The worker that receives for its host: it writes the shared copy, and waits for those who still read it."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from weightcast.sync.errors import DeadlineExceeded, PeerLost, WireError
from weightcast.sync.host.lease import Lease
from weightcast.sync.host.leases import LeaseBook
from weightcast.sync.host.packets import Connection, listen
from weightcast.sync.host.pool import SharedPool
from weightcast.sync.host.server import PacketServer
from weightcast.sync.host.share_messages import (
    KINDS,
    TO_LEADER,
    Denied,
    GiveBack,
    Granted,
    Join,
    Joined,
    Offered,
    OtherModel,
    Refused,
    Take,
    Withdrawn,
)
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)
_OWN = 0
# Characters of a reason that fit a packet, whatever they are.
_MAX_REASON = 900


class HostLeader:
    """Made by `join_host_share`. One thread of the worker overwrites; the followers are heard in another.

        leader.begin_overwrite(timeout_s)       # returns when nobody reads
        ...                                     # write leader.pool.take(spec) of any of the specs
        leader.finish_overwrite(version)        # when every digest was right

    A version that cannot be finished is simply begun again; meanwhile nobody gets a lease.
    """

    is_leader = True

    def __init__(
        self,
        path: Path,
        model: str,
        pool: SharedPool,
        allowed_uids: frozenset[int],
        lease_s: float,
        unlock: Callable[[], None],
    ) -> None:
        self.pool = pool
        self._path = path
        self._model = model
        self._unlock = unlock
        self._leases = LeaseBook(lease_s)
        if (staged := pool.staged()) is not None:
            self._leases.stage(staged)
        # What this worker's own engine reads: as in the others', a stray write ends in a fault and harms nobody.
        self._readable = pool.map_again()
        self._refused: Refused | None = None
        self._is_closed = False
        self._followers: dict[Connection, int] = {}
        self._last_number = _OWN
        self._changed = threading.Condition()
        self._server: PacketServer | None = PacketServer(listen(path), TO_LEADER, self, allowed_uids)

    @property
    def version(self) -> Version | None:
        """What is staged, or None."""
        staged = self._leases.staged
        return None if staged is None else staged.version

    @property
    def is_overwriting(self) -> bool:
        """Whether the pool may be written: from `begin_overwrite` to `finish_overwrite`."""
        return self.pool.is_open

    @property
    def num_followers(self) -> int:
        """How many workers follow."""
        return len(self._followers)

    def begin_overwrite(self, timeout_s: float) -> None:
        """Wait until nobody reads the staged version; then the pool may be written.

        Leases are waited for `lease_s` and then ended: their holders are told by `VersionError`. Raises
        `DeadlineExceeded` when some are left after `timeout_s`; then the version stays on offer. `PeerLost` when it is
        closed meanwhile.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            if self._leases.offered is not None:
                self._leases.want_overwrite(time.monotonic())
                self._tell_all(Withdrawn())
            while not self._is_closed and self._leases.staged is not None and self._is_read():
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    self._give_up(timeout_s)
                end_s = self._leases.next_end_s
                self._changed.wait(max(0.0, min(deadline_s, end_s if end_s is not None else deadline_s) - now_s))
            if self._is_closed:
                raise PeerLost("this worker receives for its host no longer: it was closed")
            self._leases.begin_overwrite()
            self.pool.begin()

    def finish_overwrite(self, version: Version) -> None:
        """The pool holds `version`, whole and checked, and is not written any more: offer it."""
        with self._changed:
            staged = self.pool.finish(version)
            self._leases.stage(staged)
            if self._refused is not None and self._refused.version == version:
                self._refused = None
            self._tell_all(Offered(staged))

    def take(self) -> Lease | None:
        """A lease of this worker's own on the staged version, or None; it too keeps `begin_overwrite` waiting."""
        with self._changed:
            offered = self._leases.offered
            if offered is None or not self._leases.take(_OWN, offered.state):
                return None
            return Lease(self._readable, offered, partial(self._give_back, _OWN))

    def refuse(self, version: Version, reason: str) -> None:
        """Tell the followers, and who joins later, that this version is not to come."""
        with self._changed:
            self._refused = Refused(version, reason[:_MAX_REASON])
            self._tell_all(self._refused)

    def close(self) -> None:
        """Stop leading: followers notice, and one of them takes over. The pool must not be written any more."""
        if self._server is not None:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)
            self.pool.close()
            self._unlock()

    def heard(self, peer: Connection, message: Any) -> bool:
        """From the server's thread."""
        with self._changed:
            if isinstance(message, Join):
                return self._join(peer, message)
            if peer not in self._followers:
                raise WireError("a worker must join first")
            number = self._followers[peer]
            if isinstance(message, Take):
                if self._leases.take(number, message.state):
                    _tell(peer, Granted(message.request, self._leases.lease_s))
                else:
                    _tell(peer, Denied(message.request))
            elif isinstance(message, GiveBack):
                self._leases.give_back(number)
            self._changed.notify_all()
            return True

    def left(self, peer: Connection) -> None:
        """From the server's thread."""
        with self._changed:
            if peer in self._followers:
                self._leases.give_back(self._followers.pop(peer))
                self._changed.notify_all()

    def _join(self, peer: Connection, message: Join) -> bool:
        if message.model != self._model:
            _tell(peer, OtherModel(self._model))
            return False
        peer.send(KINDS[Joined], Joined(self.pool.num_bytes, self._leases.offered), self.pool.descriptor)
        if self._refused is not None:
            _tell(peer, self._refused)
        if peer not in self._followers:
            self._last_number += 1
            self._followers[peer] = self._last_number
        return True

    def _is_read(self) -> bool:
        late = self._leases.end_late(time.monotonic())
        if late:
            logger.warning(
                "%s kept version %s for more than %s s; it is overwritten",
                self._names(late),
                self.version,
                self._leases.lease_s,
            )
        return bool(self._leases.holders)

    def _give_up(self, timeout_s: float) -> None:
        names = self._names(self._leases.holders)
        self._leases.cancel_overwrite()
        assert self._leases.offered is not None
        self._tell_all(Offered(self._leases.offered))
        raise DeadlineExceeded(
            f"{names} still read version {self.version} after {timeout_s:.1f} s; it is not overwritten. "
            f"Wait longer (leases end after {self._leases.lease_s:.0f} s), or join with a shorter lease_s"
        )

    def _names(self, holders: tuple[int, ...]) -> str:
        pids = {number: peer.pid for peer, number in self._followers.items()}
        return ", ".join("this process" if holder == _OWN else f"process {pids[holder]}" for holder in holders)

    def _give_back(self, holder: int) -> None:
        with self._changed:
            self._leases.give_back(holder)
            self._changed.notify_all()

    def _tell_all(self, message: Any) -> None:
        """A follower that does not read what it is sent is dropped; it may join again."""
        for peer in self._followers:
            try:
                _tell(peer, message)
            except PeerLost:
                peer.hang_up()


def _tell(peer: Connection, message: Any) -> None:
    peer.send(KINDS[type(message)], message)
