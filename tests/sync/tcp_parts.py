"""Parts of the tests of TCP links: both ends behind the protocols of `transports/base.py`, and a forwarder that alters.

with Forwarder(port, alter) as forwarder:       # forwarder.port leads to `port`, by way of `alter`
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np

from weightcast.sync.effects import Request
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports.base import ReceivedChunk
from weightcast.sync.transports.tcp import TcpLink, reach
from weightcast.sync.transports.tcp_server import TcpChunkServer

Alter = Callable[[int, bytes], bytes | None]
"""(bytes before, some bytes of a source) -> what the engine gets instead; None ends the link."""


class PolledServer:
    """A server with threads of its own as a `ChunkServer`, whose `answer` only says that more is packed."""

    def __init__(self) -> None:
        self.tcp = TcpChunkServer("127.0.0.1")
        self.address = self.tcp.ticket.hex()
        self.socket: Any = _Idle()

    @property
    def is_sending(self) -> bool:
        """As the server says."""
        return self.tcp.is_sending

    @property
    def has_sent(self) -> bool:
        """Of no interest here."""
        return False

    @property
    def awaited_index(self) -> int | None:
        """As the server says."""
        return self.tcp.awaited_index

    def hold(self, snapshot: Snapshot) -> None:
        """As the server does."""
        self.tcp.hold(snapshot)

    def drop(self) -> None:
        """As the server does."""
        self.tcp.drop()

    def answer(self) -> None:
        """More is packed."""
        self.tcp.notify()

    def close(self) -> None:
        """End."""
        self.tcp.close()


class _Idle:
    def poll(self, timeout_ms: int) -> None:
        """Nothing to do."""


class _Polled:
    def __init__(self, link: TcpLink) -> None:
        self.link = link

    def poll(self, timeout_ms: int) -> None:
        """Wait until it is readable."""
        select.select([self.link], [], [], timeout_ms / 1000)


class LinkClient:
    """A link as a `ChunkClient`; the address of a request is a ticket in hexadecimal."""

    def __init__(self) -> None:
        self._links: dict[str, _Polled] = {}

    def ask(self, request: Request) -> None:
        """Over a link that is opened where there is none."""
        if request.address not in self._links:
            self._links[request.address] = _Polled(reach(bytes.fromhex(request.address), 10))
        self._links[request.address].link.ask(request)

    def sockets(self) -> list[Any]:
        """The links."""
        return list(self._links.values())

    def receive(self, socket: Any) -> ReceivedChunk | None:
        """Into scratch memory: landings are the protocol's business."""
        received: ReceivedChunk | None = socket.link.receive(3, lambda rank, header, num_bytes, scratch: None)
        return received

    def close(self) -> None:
        """End."""
        for polled in self._links.values():
            polled.link.close()


@contextlib.contextmanager
def linked(server: TcpChunkServer) -> Iterator[TcpLink]:
    """A link to it."""
    link = reach(server.ticket, 10.0)
    try:
        yield link
    finally:
        link.close()


def wait_for(link: TcpLink, timeout_s: float = 10.0) -> ReceivedChunk:
    """The next chunk of a link, in scratch memory."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        select.select([link], [], [], 0.05)
        if (received := link.receive(3, lambda rank, header, num_bytes, scratch: None)) is not None:
            return received
    raise TimeoutError("no chunk came")


def body_of(received: ReceivedChunk) -> bytes:
    """The bytes of a chunk in scratch memory."""
    assert isinstance(received.buffer, np.ndarray)
    return received.buffer.tobytes()


class Forwarder:
    """Passes connections on to a port of the loopback; what comes back is altered on its way."""

    def __init__(self, port: int, alter: Alter) -> None:
        self._target = port
        self._alter = alter
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.num_links = 0
        self._open: list[socket.socket] = [self._listener]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                front, _ = self._listener.accept()
            except OSError:
                return
            self.num_links += 1
            back = socket.create_connection(("127.0.0.1", self._target))
            self._open += [front, back]
            threading.Thread(target=self._pass, args=(front, back, lambda before, raw: raw), daemon=True).start()
            threading.Thread(target=self._pass, args=(back, front, self._alter), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, alter: Alter) -> None:
        num_bytes = 0
        with contextlib.suppress(OSError):
            while raw := source.recv(1 << 16):
                altered = alter(num_bytes, raw)
                if altered is None:
                    break
                num_bytes += len(raw)
                target.sendall(altered)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Forwarder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._thread.join(5)
