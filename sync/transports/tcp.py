"""TCP links: a source sends its chunks over plain sockets, from threads of its own, straight to their places.

    link = reach(ticket, timeout_s)                # engine; the ticket was announced over the control channel
    link.ask(request)                              # a run of chunks, ahead of those that are still to come
    while (received := link.receive(rank, open_landing)) is not None:
        ...                                        # when link.fileno() is readable

libzmq copies what it receives once more, hands it from thread to thread, and wakes its reader for every message. Here
the kernel wakes the reader when there is much to read (`SO_RCVLOWAT`), and each step of a chunk is digested while it
is in the cache. Nothing blocks but `reach`; links to several sources are read by one thread, in turn.

A source is believed as little as over ZeroMQ: lengths are bounded before anything is received, and what makes no sense
ends the link, after which the source is asked over ZeroMQ. See `tcp_server.py` for who may ask, and what is not secret.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.effects import Request
from weightcast.sync.errors import ReachError, WireError
from weightcast.sync.landing import Landing
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.transports import tcp_wire
from weightcast.sync.transports.base import ReceivedChunk

KIND = tcp_wire.KIND
CONNECT_S = 5.0
# A reader is woken when so much is there, or the rest of the chunk.
WAKE_BYTES = 2 << 20
_MIN_SILENCE_S = 2.0

OpenLanding: TypeAlias = Callable[[int, ChunkHeader, int, ByteArray], Landing | None]
"""(source rank, header, bytes of its body, scratch) -> where it is received; None for the scratch itself."""


class TcpLink:
    """An engine's end. One thread; see the module. `ReachError` from any method: the link is of no use any more."""

    kind = KIND

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._socket = sock
        self._name = "{}:{}".format(*sock.getpeername()[:2])
        self._silence_s = max(timeout_s, _MIN_SILENCE_S)
        self._num_awaited = 0
        self._heard_s = time.monotonic()
        self._limit_bytes = 0
        self._scratch: ByteArray = np.empty(0, np.uint8)
        self._start = memoryview(bytearray(tcp_wire.CHUNK_PREFIX.size))
        self._header_bytes = memoryview(bytearray(tcp_wire.MAX_HEADER_BYTES))
        self._num_read = 0  # of the two above
        self._header: ChunkHeader | None = None
        self._landing: Landing | None = None
        self._room = memoryview(b"")  # of the scratch, where there is no landing
        self._num_bytes = self._num_left = 0
        self._is_void = False
        self._wake_bytes = 1
        sock.setblocking(False)

    def fileno(self) -> int:
        """Readable when `receive` has something to do."""
        return self._socket.fileno()

    def ask(self, request: Request) -> None:
        """Ask for a run of chunks; larger ones than the request allows end the link."""
        self._limit_bytes = request.chunk_bytes
        if len(self._scratch) < request.chunk_bytes and self._header is None:
            self._scratch = np.empty(request.chunk_bytes, np.uint8)
        raw = tcp_wire.pack_request(request.message)
        if not self._num_awaited:
            self._heard_s = time.monotonic()
        self._num_awaited += request.message.count
        try:
            num_sent = self._socket.send(raw)
        except OSError as error:
            raise self._broken(f"a request could not be sent: {error}") from None
        if num_sent < len(raw):
            raise self._broken("it takes no more requests")

    def check(self, now_s: float) -> None:
        """`ReachError` when what was asked for does not come, nor a sign of the source."""
        if self._num_awaited > 0 and now_s - self._heard_s > self._silence_s:
            raise self._broken(f"it was silent for {self._silence_s:g} s")

    def keep(self, owner: object) -> None:
        """Write to no other memory than that of this owner of landings; what is on its way to another's is dropped."""
        landing = self._landing
        if landing is not None and landing.owner is not owner:
            self._landing, self._is_void = None, True
            self._room = self._scratch[: self._num_left].data

    def receive(self, rank: int, open_landing: OpenLanding) -> ReceivedChunk | None:
        """The next chunk, whole, or None when more of it is to come. Its buffer is good until the next call."""
        while True:
            if self._header is None:
                if not self._read_header():
                    return None
                self._open(rank, open_landing)
            if not self._fill():
                return None
            received = self._close_chunk(rank)
            if received is not None:
                return received

    def _open(self, rank: int, open_landing: OpenLanding) -> None:
        assert self._header is not None
        self._num_left = self._num_bytes
        if self._num_bytes:
            self._landing = open_landing(rank, self._header, self._num_bytes, self._scratch)
            if self._landing is None:
                self._room = self._scratch[: self._num_bytes].data
            self._wake_at(self._num_left)

    def _fill(self) -> bool:
        while self._num_left:
            landing = self._landing
            num_bytes = self._read(self._room if landing is None else landing.room())
            if not num_bytes:
                self._wake_at(self._num_left)
                return False
            self._num_left -= num_bytes
            if landing is None:
                self._room = self._room[num_bytes:]
            else:
                landing.advance(num_bytes)
        return True

    def _close_chunk(self, rank: int) -> ReceivedChunk | None:
        header, landing, is_void = self._header, self._landing, self._is_void
        assert header is not None
        self._header, self._landing, self._is_void = None, None, False
        self._num_awaited -= 1
        self._wake_at(1)
        if is_void:
            return None
        if not self._num_bytes:
            return ReceivedChunk(rank, header, None)
        return ReceivedChunk(rank, header, landing if landing is not None else self._scratch[: self._num_bytes])

    def _read_header(self) -> bool:
        size = len(self._start)
        while True:
            while self._num_read < size:
                num_bytes = self._read(self._start[self._num_read :])
                if not num_bytes:
                    return False
                self._num_read += num_bytes
            num_header, self._num_bytes = tcp_wire.CHUNK_PREFIX.unpack(self._start)
            if num_header:
                break
            self._num_read = 0  # a beat
            if self._num_bytes:
                raise self._broken("it sent a body without a header")
        if num_header > tcp_wire.MAX_HEADER_BYTES or self._num_bytes > self._limit_bytes:
            raise self._broken(f"it sent {num_header} and {self._num_bytes} bytes, which no chunk of it has")
        while self._num_read < size + num_header:
            num_bytes = self._read(self._header_bytes[self._num_read - size : num_header])
            if not num_bytes:
                return False
            self._num_read += num_bytes
        self._num_read = 0
        try:
            self._header = tcp_wire.read_header(self._header_bytes[:num_header])
        except WireError as error:
            raise self._broken(f"it sent no chunk: {error}") from None
        return True

    def _read(self, room: memoryview) -> int:
        """Bytes that were there; 0 when there are none."""
        try:
            num_bytes = self._socket.recv_into(room)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._broken(str(error)) from None
        if not num_bytes:
            raise self._broken("the source closed it")
        self._heard_s = time.monotonic()
        return num_bytes

    def _wake_at(self, num_bytes: int) -> None:
        """Be readable only when so much is there, of which it is sure that it comes."""
        num_bytes = min(num_bytes, WAKE_BYTES)
        if num_bytes != self._wake_bytes:
            self._wake_bytes = num_bytes
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)

    def _broken(self, why: str) -> ReachError:
        return ReachError(f"the TCP link to the source at {self._name} is given up: {why}")

    def close(self) -> None:
        """End the link."""
        self._socket.close()


def reach(ticket: bytes, timeout_s: float) -> TcpLink:
    """A link to the source that gave out `ticket`; at most `timeout_s`, which also bounds a source's silence.

    Raises `WireError` for a malformed ticket, `ReachError` when the source is not there or does not admit this engine.
    """
    read = tcp_wire.read_ticket(ticket)
    wait_s = min(timeout_s, CONNECT_S)
    try:
        sock = socket.create_connection((read.host, read.port), wait_s)
    except OSError as error:
        raise ReachError(
            f"no source answers over TCP at {read.host}:{read.port}: {error}; is a firewall in between?"
        ) from None
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(tcp_wire.MAGIC + read.token)
        if sock.recv(1) != tcp_wire.ADMITTED:
            raise OSError("it closed the link")
        return TcpLink(sock, timeout_s)
    except OSError as error:
        sock.close()
        raise ReachError(
            f"the source at {read.host}:{read.port} did not admit this engine: {error}; the ticket is of an earlier "
            "life of it, or too many engines ask at once"
        ) from None
