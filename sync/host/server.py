"""A thread that listens on a Unix socket and hears the packets of this host's processes.

What the packets mean is its handler's business. It admits only the users that it was told, a bounded number of
them, drops whoever says nothing for too long at first or anything malformed, and goes on.
"""

import contextlib
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from weightcast.sync.errors import DeadlineExceeded, WireError
from weightcast.sync.host.packets import Connection

MAX_PEERS = 256
FIRST_MESSAGE_S = 5.0


class Handler(Protocol):
    """What is done with packets; called from the server's thread, never twice at once."""

    def heard(self, peer: Connection, message: Any) -> bool:
        """A message came; False ends the connection. So do `WireError` and `PeerLost`."""
        ...

    def left(self, peer: Connection) -> None:
        """A peer is gone, or was dropped; its connection is closed after this."""
        ...


class PacketServer:
    """The thread and its connections. `listener` becomes its own; `close` ends all.

    `with_descriptor` is what is done with a packet that carries a descriptor, which is closed afterwards; without it
    such packets are malformed.
    """

    def __init__(
        self,
        listener: socket.socket,
        kinds: Mapping[str, type[Any]],
        handler: Handler,
        allowed_uids: frozenset[int],
        *,
        max_peers: int = MAX_PEERS,
        first_message_s: float = FIRST_MESSAGE_S,
        with_descriptor: Callable[[Connection, Any, int], bool] | None = None,
    ) -> None:
        self._listener = listener
        self._kinds = dict(kinds)
        self._handler = handler
        self._with_descriptor = with_descriptor
        self._allowed_uids = allowed_uids
        self._max_peers = max_peers
        self._first_message_s = first_message_s
        # Of each peer: when it must have said its first word; None when it has.
        self._peers: dict[Connection, float | None] = {}
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        close_in_children(self)
        self._thread = threading.Thread(target=self._run, name="weightcast-packets", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Drop everybody, stop listening, and wait for the thread."""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join()
        self._wake.close()

    def close_descriptors(self) -> None:
        """In a forked child, which has no thread: let go of the copies, so that the parent's death is noticed."""
        for held in (self._listener, self._wake, self._woken):
            held.close()
        for peer in self._peers:
            peer.close()
        self._selector.close()

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        finally:
            for peer in list(self._peers):
                self._drop(peer)
            self._listener.close()
            self._woken.close()
            self._selector.close()

    def _serve(self) -> bool:
        deadlines = [until_s for until_s in self._peers.values() if until_s is not None]
        timeout_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._woken:
                return False
            if key.fileobj is self._listener:
                self._accept()
            elif key.data in self._peers:
                self._hear(key.data)
        now_s = time.monotonic()
        for peer in [peer for peer, until_s in self._peers.items() if until_s is not None and until_s <= now_s]:
            self._drop(peer)
        return True

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            time.sleep(0.05)  # no descriptor is free, say; whoever knocks still waits
            return
        peer = Connection(sock)
        if peer.uid not in self._allowed_uids or len(self._peers) >= self._max_peers:
            peer.close()
            return
        self._peers[peer] = time.monotonic() + self._first_message_s
        self._selector.register(peer, selectors.EVENT_READ, peer)

    def _hear(self, peer: Connection) -> None:
        try:
            message, descriptor = peer.receive(self._kinds, 0)
            if descriptor is not None:
                goes_on = self._hear_with(peer, message, descriptor)
            else:
                self._peers[peer] = None
                goes_on = self._handler.heard(peer, message)
        except DeadlineExceeded:
            return
        except (WireError, OSError):  # the peer is gone (`PeerLost`), say, or no descriptor is free for an answer
            goes_on = False
        if not goes_on:
            self._drop(peer)

    def _hear_with(self, peer: Connection, message: Any, descriptor: int) -> bool:
        try:
            if self._with_descriptor is None:
                raise WireError("no descriptor was expected")
            self._peers[peer] = None
            return self._with_descriptor(peer, message, descriptor)
        finally:
            os.close(descriptor)

    def _drop(self, peer: Connection) -> None:
        del self._peers[peer]
        self._selector.unregister(peer)
        self._handler.left(peer)
        peer.close()


class HoldsDescriptors(Protocol):
    """What must not keep descriptors open in forked children."""

    def close_descriptors(self) -> None:
        """Close the copies that a forked child got."""
        ...


def close_in_children(holder: HoldsDescriptors) -> None:
    """Have `holder.close_descriptors()` called in every child that this process forks, while `holder` lives.

    A child that outlives this process would else keep its locks and connections, and nobody would notice its death.
    """
    reference = weakref.ref(holder)

    def close() -> None:
        if (held := reference()) is not None:
            held.close_descriptors()

    os.register_at_fork(after_in_child=close)
