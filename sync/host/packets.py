"""Packets between processes of one host: checked messages on a Unix socket, whose other end the kernel names.

    connection = connect(path, owners, timeout_s)       # ReachError when nobody, or a stranger, listens there
    connection.send("hello", Hello(token))
    message, descriptor = connection.receive(KINDS, timeout_s)

A packet is one message (`weightcast.sync.schema`) and may carry one file descriptor. Packets keep their bounds, so that
a malformed one never shifts the next.
"""

import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from weightcast.sync import schema
from weightcast.sync.errors import DeadlineExceeded, PeerLost, ReachError, WireError
from weightcast.sync.host.folders import MAX_PATH_BYTES, UNFINISHED

MAX_PACKET_BYTES = 4096
_CREDENTIALS = struct.Struct("3i")


class Connection:
    """One end of a connection. `pid` and `uid` are the other end's, as the kernel says, when it was made."""

    def __init__(self, sock: socket.socket) -> None:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(raw)
        self._socket = sock

    def fileno(self) -> int:
        """For a selector: readable when there is a packet, or the end; -1 when closed."""
        return self._socket.fileno()

    def send(self, kind: str, message: Any, descriptor: int | None = None) -> None:
        """Send without waiting. `PeerLost` when the other end is gone, or does not read what it is sent."""
        packet = schema.pack(kind, message)
        assert len(packet) <= MAX_PACKET_BYTES, "such a message does not fit a packet"
        descriptors = [] if descriptor is None else [descriptor]
        try:
            self._socket.settimeout(0)
            socket.send_fds(self._socket, [packet], descriptors, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise PeerLost(f"process {self.pid} of this host cannot be told {kind!r}: {error.strerror}") from None

    def receive(self, kinds: dict[str, type[Any]], timeout_s: float) -> tuple[Any, int | None]:
        """The next message, one of `kinds`, and the descriptor that came with it, which the caller must close.

        Raises `DeadlineExceeded`, `PeerLost` at the end, `WireError` for anything else than a message.
        """
        try:
            self._socket.settimeout(max(timeout_s, 0))
            packet, descriptors, flags, _ = socket.recv_fds(self._socket, MAX_PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except (TimeoutError, BlockingIOError):
            raise DeadlineExceeded(f"process {self.pid} of this host sent nothing for {timeout_s:.1f} s") from None
        except OSError as error:
            raise PeerLost(f"process {self.pid} of this host is gone: {error.strerror}") from None
        try:
            if not packet:
                raise PeerLost(f"process {self.pid} of this host closed its connection, or died")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise WireError(f"process {self.pid} sent a packet of more than {MAX_PACKET_BYTES} bytes")
            return schema.unpack(packet, kinds), descriptors.pop() if descriptors else None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def hang_up(self) -> None:
        """End the connection for both sides; whoever waits on it notices. `close` must follow."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


def listen(path: Path, *, mode: int = 0o600, backlog: int = 128) -> socket.socket:
    """A socket that listens at `path`, in the place of one that was there before.

    It has its name only when it listens: what has the name and refuses connections is dead.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    new = path.with_name(path.name + UNFINISHED)
    try:
        new.unlink(missing_ok=True)
        listener.bind(str(new))
        new.chmod(mode)
        listener.listen(backlog)
        new.rename(path)
    except OSError as error:
        listener.close()
        raise ReachError(f"cannot listen at {path}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def connect(path: Path, owners: frozenset[int], timeout_s: float) -> Connection:
    """A connection to the process of one of the users `owners` that listens at `path`.

    Raises `FileNotFoundError`, `PermissionError` and `ConnectionRefusedError` as the kernel does; `ReachError` when
    another user's process answers, or the path cannot be one; `DeadlineExceeded`.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ReachError(f"the path of the socket {path} is longer than {MAX_PATH_BYTES} bytes")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _connect_until(sock, path, time.monotonic() + timeout_s)
        connection = Connection(sock)
        if connection.uid not in owners:
            raise ReachError(
                f"a process of the user {connection.uid} listens at {path}; only {sorted(owners)} are believed. "
                "Run both sides as one user, or list the user among the allowed ones"
            )
    except BaseException:
        sock.close()
        raise
    return connection


def _connect_until(sock: socket.socket, path: Path, deadline_s: float) -> None:
    """A full backlog answers at once with EAGAIN, not after a wait: others are ahead of us."""
    sock.setblocking(False)
    while True:
        try:
            return sock.connect(str(path))
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise DeadlineExceeded(f"the process that listens at {path} takes no connections") from None
            time.sleep(0.01)
        except (FileNotFoundError, PermissionError, ConnectionRefusedError):
            raise
        except OSError as error:
            raise ReachError(f"cannot connect to {path}: {error.strerror}") from None
