"""One TCP link as the source's thread has it: requests come in, chunks go out (see `tcp_server.py`)."""

import socket
import struct
import time
from collections.abc import Sequence
from typing import TypeAlias

from weightcast.sync.errors import WireError
from weightcast.sync.messages import ChunkRequest
from weightcast.sync.transports import tcp_wire

# Smaller answers are gathered: a version of which little changed has thousands.
_GATHER_BYTES = 64 << 10

# The system takes no more at once (IOV_MAX).
_MAX_BUFFERS = 1024

Buffer: TypeAlias = bytes | bytearray | memoryview


class SendingLink:
    """One connection, and what its thread does with it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.is_known = False
        self.is_sending = False
        self.awaited_index: int | None = None
        self._gathered = bytearray()

    def prepare(self, stall_s: float) -> None:
        """Blocking calls that end after `stall_s` without a byte: the kernel waits, not this process."""
        self.socket.settimeout(None)
        limit = struct.pack("ll", int(stall_s), int(stall_s % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def read_within(self, num_bytes: int, timeout_s: float) -> bytes:
        """So many bytes, or `OSError`."""
        deadline_s = time.monotonic() + timeout_s
        raw = b""
        while len(raw) < num_bytes:
            self.socket.settimeout(max(0.001, deadline_s - time.monotonic()))
            part = self.socket.recv(num_bytes - len(raw))
            if not part:
                raise OSError("the link was closed")
            raw += part
        return raw

    def read_request(self) -> ChunkRequest | None:
        """The next request, for which a link may wait for ever; None when the engine closed it."""
        prefix = self._read(tcp_wire.REQUEST_PREFIX.size, is_first=True)
        if prefix is None:
            return None
        (num_bytes,) = tcp_wire.REQUEST_PREFIX.unpack(prefix)
        if not 0 < num_bytes <= tcp_wire.MAX_REQUEST_BYTES:
            raise WireError(f"a request of {num_bytes} bytes")
        raw = self._read(num_bytes)
        assert raw is not None
        return tcp_wire.read_request(raw)

    def _read(self, num_bytes: int, *, is_first: bool = False) -> bytes | None:
        raw = b""
        while len(raw) < num_bytes:
            try:
                part = self.socket.recv(num_bytes - len(raw))
            except BlockingIOError:
                if is_first and not raw:
                    continue
                raise OSError("a request broke off") from None
            if not part:
                if is_first and not raw:
                    return None
                raise OSError("the link was closed amid a request")
            raw += part
        return raw

    @property
    def has_gathered(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._gathered)

    def gather(self, raw: bytes) -> None:
        """Send something small, soon."""
        self._gathered += raw

    def send_body(self, body: Sequence[memoryview]) -> None:
        """Send a body, which may lie in several places, after what was gathered."""
        if len(self._gathered) + sum(map(len, body)) < _GATHER_BYTES:
            for part in body:
                self._gathered += part
        else:
            self._send([self._gathered, *body])
            self._gathered = bytearray()

    def flush(self) -> None:
        """Send what was gathered."""
        if self._gathered:
            self._send([self._gathered])
            self._gathered = bytearray()

    def _send(self, buffers: list[Buffer]) -> None:
        left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while left:
            num_sent = self.socket.sendmsg(left[:_MAX_BUFFERS])
            while left and num_sent >= len(left[0]):
                num_sent -= len(left.pop(0))
            if num_sent:
                left[0] = left[0][num_sent:]
