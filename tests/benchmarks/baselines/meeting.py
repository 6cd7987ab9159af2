"""Where the two ends of a baseline meet: a free loopback port, and a socket on which small messages go.

listener = listen("127.0.0.1")         # sender; listener.address goes to the receiver
stream = listener.accept()             # sender
stream = dial(address)                 # receiver
"""

import socket
import struct
from dataclasses import dataclass

TIMEOUT_S = 120.0
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Stream:
    """A connected TCP socket with whole messages: a length and so many bytes."""

    socket: socket.socket

    def send(self, message: bytes) -> None:
        """One message."""
        self.socket.sendall(_LENGTH.pack(len(message)))
        self.socket.sendall(message)

    def receive(self) -> bytes:
        """One message."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return bytes(self._exactly(length))

    def _exactly(self, count: int) -> bytearray:
        message = bytearray(count)
        self.receive_into(memoryview(message))
        return message

    def receive_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes."""
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise ConnectionError("the other end has closed")
            view = view[count:]

    def close(self) -> None:
        """End."""
        self.socket.close()


class Listener:
    """A bound socket that takes one peer."""

    def __init__(self, host: str) -> None:
        self._socket = socket.create_server((host, 0))
        self._socket.settimeout(TIMEOUT_S)
        self.address = f"{host}:{self._socket.getsockname()[1]}"

    def accept(self) -> Stream:
        """The peer, once it is there."""
        connection, _ = self._socket.accept()
        self._socket.close()
        return Stream(_prepare(connection))


def dial(address: str) -> Stream:
    """The receiver's end."""
    host, _, port = address.rpartition(":")
    return Stream(_prepare(socket.create_connection((host, int(port)), TIMEOUT_S)))


def _prepare(connection: socket.socket) -> socket.socket:
    connection.settimeout(TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
