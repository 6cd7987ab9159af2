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
"""

import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weightcast.sync.errors import ConfigError, DeadlineExceeded, ModelMismatch, PeerLost, ReachError, WireError
from weightcast.sync.host.folders import shared_folder
from weightcast.sync.host.follower import HostFollower
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.packets import connect
from weightcast.sync.host.pool import SharedPool
from weightcast.sync.host.server import close_in_children
from weightcast.sync.host.share_messages import TO_FOLLOWER, Join, Joined, OtherModel
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import fingerprint

DEFAULT_LEASE_S = 60.0
# A leader answers within milliseconds; one that does not is dying, or stopped.
_ANSWER_S = 2.0
_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class HostShare:
    """Which workers of a host receive a version once for all of them: those of one user, publisher and `group`."""

    group: str
    lease_s: float = DEFAULT_LEASE_S
    """How long an engine may go on loading a version when the next one is announced; then it is overwritten."""
    base: Path | None = None
    """Where the workers meet, the same for all; by default the folder of `folders.runtime_folder`."""

    def __post_init__(self) -> None:
        if not self.group or not self.lease_s > 0:
            raise ConfigError(
                f"a host's share needs a name and a lease_s above 0 seconds, got {self.group!r} and {self.lease_s}"
            )


def join_host_share(
    address: str,
    group: str,
    specs: Iterable[TensorSpec],
    *,
    timeout_s: float,
    lease_s: float = DEFAULT_LEASE_S,
    previous: HostFollower | None = None,
    base: Path | None = None,
) -> HostLeader | HostFollower:
    """Lead this host's workers of one user that name the same publisher's address and group, or follow their leader.

    All must have the same specs, in any order. `lease_s` is how long the leader waits for a reader. `previous` is the
    follower whose leader is gone; it is closed. `base` replaces the folder of `folders.runtime_folder`.
    Raises `ModelMismatch` when the leader has other tensors, `ReachError` when the sockets' folder is not safe,
    `StorageError` without enough memory, `DeadlineExceeded` when there is no leader who answers.
    """
    specs = tuple(specs)
    if not lease_s > 0:
        raise ConfigError(f"lease_s must be more than 0 seconds, got {lease_s}")
    folder = shared_folder(base)
    name = hashlib.sha256(f"{address}\0{group}".encode()).hexdigest()[:16]
    deadline_s = time.monotonic() + timeout_s
    while True:
        member = _follow(folder / f"{name}.sock", specs, deadline_s) or _lead(folder, name, specs, lease_s, previous)
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


def _follow(path: Path, specs: tuple[TensorSpec, ...], deadline_s: float) -> HostFollower | None:
    """A follower, or None when no leader answers."""
    left_s = min(_ANSWER_S, deadline_s - time.monotonic())
    try:
        connection = connect(path, frozenset({os.geteuid()}), left_s)
    except (FileNotFoundError, ConnectionRefusedError, DeadlineExceeded):
        return None
    try:
        connection.send("join", Join(fingerprint(specs)))
        answer, descriptor = connection.receive(TO_FOLLOWER, left_s)
        if isinstance(answer, OtherModel):
            raise ModelMismatch(
                f"process {connection.pid}, which receives for this host and group, has the model {answer.model}, "
                f"this worker {fingerprint(specs)}: give workers of different models different groups"
            )
        if not isinstance(answer, Joined) or descriptor is None:
            raise WireError(f"process {connection.pid} answered {type(answer).__name__} without memory")
        try:
            pool = SharedPool.attach(specs, descriptor, deadline_s - time.monotonic())
        finally:
            os.close(descriptor)
    except (PeerLost, DeadlineExceeded):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return HostFollower(connection, pool, answer.offered)


def _lead(
    folder: Path, name: str, specs: tuple[TensorSpec, ...], lease_s: float, previous: HostFollower | None
) -> HostLeader | None:
    """The leader, or None when another process is it. What `previous` read is carried over where it is whole."""
    lock = _Lock.take(folder / f"{name}.lock")
    if lock is None:
        return None
    try:
        pool = SharedPool.create(specs)
        staged = previous.pool.staged() if previous is not None else None
        if previous is not None and staged is not None:
            pool.begin()
            pool.copy_from(previous.pool)
            pool.finish(staged.version)
        owners = frozenset({os.geteuid()})
        return HostLeader(folder / f"{name}.sock", fingerprint(specs), pool, owners, lease_s, lock.close)
    except BaseException:
        lock.close()
        raise


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
