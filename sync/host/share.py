"""Several engine workers of one host, one received copy: the first receives it, the others read it where it lies.

    member = join_host_share("tcp://trainer:5600", "llama-8b", specs, timeout_s=60)
    if member.is_leader:
        member.begin_overwrite(timeout_s)       # receive into member.pool, then
        member.finish_overwrite(version)
    else:
        with member.wait(after=serving, timeout_s=60) as lease:
            engine.load(lease.tensors)          # PeerLost: join again, with previous=member

The leader has the lock of a file in a folder that only this user can enter, named after the publisher's address and
the group. When it dies the kernel frees the lock, and the first follower that joins again leads; what was staged whole
is carried over, so that the next version may still come as a delta.

Workers may want some boxes of the model each; what all of them want is received (`members.py`).
"""

import errno
import fcntl
import hashlib
import math
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weightcast.sync.errors import ConfigError, DeadlineExceeded, PeerLost, ReachError
from weightcast.sync.host.folders import shared_folder
from weightcast.sync.host.follower import HostFollower
from weightcast.sync.host.joining import ask_to_join, hear_joined
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.members import ShareTerms
from weightcast.sync.host.packets import connect
from weightcast.sync.host.pool import SharedPool, make_pool
from weightcast.sync.host.server import close_in_children
from weightcast.sync.regions import TensorSpec
from weightcast.sync.union import unite_wanted
from weightcast.sync.wanted import WantedRegions

DEFAULT_LEASE_S = 60.0
DEFAULT_GATHER_S = 1.0
# A leader answers within milliseconds, or within some seconds where workers of a model of many tensors say all at once
# what they want; one that does not is stopped.
_ANSWER_S = 10.0
_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class HostShare:
    """Which workers of a host receive a version once for all of them: those of one user, publisher and `group`."""

    group: str
    lease_s: float = DEFAULT_LEASE_S
    """How long an engine may go on loading a version when the next one is announced; then it is overwritten."""
    base: Path | None = None
    """Where the workers meet, the same for all; by default the folder of `folders.runtime_folder`."""
    workers: int | None = None
    """How many workers of this host share it, where that is known: the first version is received when all are there."""
    gather_s: float = DEFAULT_GATHER_S
    """How long after a worker came the first version waits for more of them, unless all are there, or one that wants
    all of the model; and how long after one came or left what it wanted is received all the same."""

    def __post_init__(self) -> None:
        if not self.group or not self.lease_s > 0:
            raise ConfigError(
                f"a host's share needs a name and a lease_s above 0 seconds, got {self.group!r} and {self.lease_s}"
            )
        if (self.workers is not None and self.workers < 1) or not 0 <= self.gather_s < math.inf:
            raise ConfigError(
                f"the share {self.group!r} needs workers of at least 1 or None, and seconds for gather_s, "
                f"got {self.workers} and {self.gather_s}"
            )


def join_host_share(
    address: str,
    group: str,
    specs: Iterable[TensorSpec],
    *,
    timeout_s: float,
    wanted: WantedRegions | None = None,
    lease_s: float = DEFAULT_LEASE_S,
    workers: int | None = None,
    gather_s: float = DEFAULT_GATHER_S,
    previous: HostFollower | None = None,
    base: Path | None = None,
) -> HostLeader | HostFollower:
    """Lead this host's workers of one user that name the same publisher's address and group, or follow their leader.

    All must have the same specs, in any order. `wanted` has the boxes of them that this worker uses, all by default.
    `lease_s` is how long the leader waits for a reader; `workers` and `gather_s` as in `HostShare`. `previous` is the
    follower whose leader is gone, or has moved; it is closed. `base` replaces the folder of `folders.runtime_folder`.
    Raises `ModelMismatch` when the leader has other tensors, `ReachError` when the sockets' folder is not safe,
    `StorageError` without enough memory, `DeadlineExceeded` when there is no leader who answers.
    """
    specs = tuple(specs)
    if not lease_s > 0:
        raise ConfigError(f"lease_s must be more than 0 seconds, got {lease_s}")
    terms, wanted = ShareTerms(lease_s, workers, gather_s), unite_wanted(specs, [wanted])
    folder = shared_folder(base)
    name = hashlib.sha256(f"{address}\0{group}".encode()).hexdigest()[:16]
    deadline_s = time.monotonic() + timeout_s
    while True:
        follower = _follow(folder / f"{name}.sock", specs, wanted, deadline_s)
        member = follower or _lead(folder, name, specs, wanted, terms, previous)
        if member is not None:
            if previous is not None:
                previous.close()
            return member
        if time.monotonic() >= deadline_s:
            raise DeadlineExceeded(
                f"a process of this host has the lock {folder / name}.lock and did not answer within "
                f"{timeout_s:.1f} s; it is stopped, or still takes its memory: wait longer, or end it"
            )
        time.sleep(_RETRY_S)


def _follow(
    path: Path, specs: tuple[TensorSpec, ...], wanted: WantedRegions | None, deadline_s: float
) -> HostFollower | None:
    """A follower, or None when no leader answers."""
    left_s = min(_ANSWER_S, deadline_s - time.monotonic())
    try:
        connection = connect(path, frozenset({os.geteuid()}), left_s)
    except (FileNotFoundError, ConnectionRefusedError, DeadlineExceeded):
        return None
    try:
        ask_to_join(connection, specs, wanted)
        return HostFollower(connection, *hear_joined(connection, specs, left_s, deadline_s))
    except (PeerLost, DeadlineExceeded):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise


def _lead(
    folder: Path,
    name: str,
    specs: tuple[TensorSpec, ...],
    wanted: WantedRegions | None,
    terms: ShareTerms,
    previous: HostFollower | None,
) -> HostLeader | None:
    """The leader, or None when another process is it. What `previous` read is carried over where it is whole."""
    lock = _Lock.take(folder / f"{name}.lock")
    if lock is None:
        return None
    try:
        pool: SharedPool | None = None
        if previous is not None and previous.has_pool:
            pool = _carry_over(specs, wanted, previous.pool)
        elif wanted is None:
            pool = make_pool(specs, None)
        return HostLeader(folder / f"{name}.sock", specs, wanted, pool, terms, lock.close)
    except BaseException:
        lock.close()
        raise


def _carry_over(specs: tuple[TensorSpec, ...], wanted: WantedRegions | None, before: SharedPool) -> SharedPool:
    """A pool for the union that was received so far, with the version that lies there whole; a torn one is left."""
    staged = before.staged()
    union = before.wanted if staged is not None else unite_wanted(specs, [before.wanted, wanted])
    pool = make_pool(specs, union)
    if staged is not None:
        pool.begin()
        pool.copy_from(before)
        pool.finish(staged.version)
    return pool


class _Lock:
    """The lock of a file: one process at most has it, and the kernel frees it when that one is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        close_in_children(self)

    @classmethod
    def take(cls, path: Path) -> "_Lock | None":
        """The lock, or None when another has it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise ReachError(f"cannot open {path}: {reason}; remove it") from None
        info = os.fstat(descriptor)
        try:
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                raise ReachError(f"{path} is no file of this user; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def close(self) -> None:
        """Free the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def close_descriptors(self) -> None:
        """A forked child's copy would keep the lock after this process's end."""
        self.close()
