"""The worker that receives for its host: it writes the shared copy, and waits for those who still read it."""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from weightcast.sync.errors import DeadlineExceeded, PeerLost, StorageError, WireError
from weightcast.sync.host.box_files import read_boxes
from weightcast.sync.host.joining import answer_join
from weightcast.sync.host.lease import Lease
from weightcast.sync.host.leases import LeaseBook
from weightcast.sync.host.members import Members, ShareTerms
from weightcast.sync.host.packets import Connection, listen
from weightcast.sync.host.pool import SharedPool, make_pool
from weightcast.sync.host.server import PacketServer
from weightcast.sync.host.share_messages import (
    KINDS,
    TO_LEADER,
    Denied,
    GiveBack,
    Granted,
    Join,
    Moved,
    Offered,
    OtherModel,
    Refused,
    Take,
    Withdrawn,
)
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version, fingerprint
from weightcast.sync.wanted import WantedRegions

logger = logging.getLogger(__name__)
_OWN = 0
# Characters of a reason that fit a packet, whatever they are.
_MAX_REASON = 900


class HostLeader:
    """Made by `join_host_share`. One thread of the worker overwrites; the followers are heard in another.

        leader.begin_overwrite(timeout_s)       # returns when nobody reads
        ...                                     # write leader.pool.take(spec) of any of `leader.pool.wanted`
        leader.finish_overwrite(version)        # when every digest was right

    A version that cannot be finished is simply begun again; meanwhile nobody gets a lease. `pool` is what is there
    already: without it one is made when the first version is to be written, for what all want who came until then.
    `wanted` is what this worker's own engine wants, None for all of the model.
    """

    is_leader = True

    def __init__(
        self,
        path: Path,
        specs: tuple[TensorSpec, ...],
        wanted: WantedRegions | None,
        pool: SharedPool | None,
        terms: ShareTerms,
        unlock: Callable[[], None],
    ) -> None:
        self._path = path
        self._specs = specs
        self._unlock = unlock
        self._leases = LeaseBook(terms.lease_s)
        self._members = Members(specs, terms)
        self._members.join(_OWN, wanted, time.monotonic())
        # `_readable` is what this worker's own engine reads: as in the others', a stray write ends in a fault.
        self._pool, self._readable = pool, None if pool is None else pool.map_again()
        if pool is not None and (staged := pool.staged()) is not None:
            self._leases.stage(staged)
        self._refused: Refused | None = None
        self._is_closed = False
        self._followers: dict[Connection, int] = {}
        self._last_number = _OWN
        self._changed = threading.Condition()
        self._server: PacketServer | None = PacketServer(
            listen(path), TO_LEADER, self, frozenset({os.geteuid()}), with_descriptor=self._heard_boxes
        )

    @property
    def pool(self) -> SharedPool:
        """Where the version is written; another one after `begin_overwrite` when another union is to be received."""
        assert self._pool is not None, "there is a pool after begin_overwrite()"
        return self._pool

    @property
    def has_pool(self) -> bool:
        """Whether there is one."""
        return self._pool is not None

    @property
    def version(self) -> Version | None:
        """What is staged, or None."""
        staged = self._leases.staged
        return None if staged is None else staged.version

    @property
    def is_overwriting(self) -> bool:
        """Whether the pool may be written: from `begin_overwrite` to `finish_overwrite`."""
        return self._pool is not None and self._pool.is_open

    @property
    def num_followers(self) -> int:
        """How many workers follow."""
        return len(self._followers)

    def begin_overwrite(self, timeout_s: float) -> None:
        """Wait until nobody reads the staged version; then the pool may be written.

        Leases are waited for `lease_s` and then ended: their holders are told by `VersionError`. Raises
        `DeadlineExceeded` when some are left after `timeout_s`; then the version stays on offer. `PeerLost` when it is
        closed meanwhile. Before the first pool, workers that are about to come are waited for. `StorageError` without
        the memory for that one; for another union, the pool stays as it is then, with a warning.
        """
        with self._changed:
            self._gather()
            self._wait_for_readers(timeout_s)
            held = () if self._pool is None else (self._pool.wanted,)
            union = self._members.unite(held, time.monotonic())
            if self._pool is not None and union == self._pool.wanted:
                return self._open_pool(self._pool)
        self._move(union)

    def _gather(self) -> None:
        """Wait for workers that are about to come, when nothing was received yet; the lock is held."""
        while self._pool is None and not self._is_closed:
            if not (wait_s := self._members.first_wait_s(time.monotonic())):
                return
            self._changed.wait(wait_s)

    def _wait_for_readers(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        if self._leases.offered is not None:
            self._leases.want_overwrite(time.monotonic())
            self._tell_all(Withdrawn())
        while not self._is_closed and self._leases.staged is not None and self._is_read():
            now_s = time.monotonic()
            if now_s >= deadline_s:
                self._give_up(timeout_s)
            end_s = self._leases.next_end_s
            self._changed.wait(max(0.0, min(deadline_s, end_s if end_s is not None else deadline_s) - now_s))

    def _open_pool(self, pool: SharedPool) -> None:
        if self._is_closed:
            raise PeerLost("this worker receives for its host no longer: it was closed")
        self._leases.begin_overwrite()
        pool.begin()

    def _move(self, union: WantedRegions | None) -> None:
        """Write from now on to a pool for `union`, with what was there of that. Nobody gets a lease meanwhile."""
        before = self._pool
        try:
            pool = make_pool(self._specs, union, before)
            readable = pool.map_again()
        except StorageError as error:
            if before is None:
                raise
            logger.warning("some workers of this host receive by themselves: what all want does not fit: %s", error)
            with self._changed:
                return self._open_pool(before)
        with self._changed:
            self._open_pool(pool)
            self._pool, self._readable = pool, readable
            self._tell_all(Moved())
        if before is not None:
            before.close()

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
            if offered is None or self._readable is None or not self._leases.take(_OWN, offered.state):
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
            if self._pool is not None:
                self._pool.close()
            self._unlock()

    def heard(self, peer: Connection, message: Any) -> bool:
        """From the server's thread."""
        with self._changed:
            if isinstance(message, Join):
                return self._join(peer, message, None)
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

    def _heard_boxes(self, peer: Connection, message: Any, descriptor: int) -> bool:
        """From the server's thread: a worker joins that does not want all of the model."""
        if not isinstance(message, Join):
            raise WireError("boxes come with a worker's first word")
        wanted = read_boxes(descriptor, self._specs) if message.model == fingerprint(self._specs) else None
        with self._changed:
            return self._join(peer, message, wanted)

    def left(self, peer: Connection) -> None:
        """From the server's thread."""
        with self._changed:
            if peer in self._followers:
                number = self._followers.pop(peer)
                self._leases.give_back(number)
                self._members.leave(number, time.monotonic())
                self._changed.notify_all()

    def _join(self, peer: Connection, message: Join, wanted: WantedRegions | None) -> bool:
        if message.model != fingerprint(self._specs):
            _tell(peer, OtherModel(fingerprint(self._specs)))
            return False
        answer_join(peer, self._specs, self._pool, self._leases.offered)
        if self._refused is not None:
            _tell(peer, self._refused)
        if peer not in self._followers:
            self._last_number += 1
            self._followers[peer] = self._last_number
        self._members.join(self._followers[peer], wanted, time.monotonic())
        self._changed.notify_all()
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
