"""What a source serves its chunks with: a ZeroMQ socket, and TCP links where those were asked for.

    kinds = choose_kinds(expose, address, keys)       # what to expose where the user did not say
    servers = ChunkServers(context, address, keys, "tcp" in kinds)

Both serve the same snapshot; an engine that has the ticket of the one may always ask the other.
"""

import logging
from collections.abc import Sequence

import zmq

from weightcast.sync.errors import ConfigError
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports import tcp_wire
from weightcast.sync.transports.reaches import check_kinds
from weightcast.sync.transports.tcp_server import TcpChunkServer
from weightcast.sync.transports.zmq_chunks import ZmqChunkServer
from weightcast.sync.transports.zmq_sockets import CurveKeys, parse_address

logger = logging.getLogger(__name__)


def choose_kinds(expose: Sequence[str] | None, address: str, keys: CurveKeys | None) -> tuple[str, ...]:
    """The kinds to expose; None leaves the choice to us: what is fast and needs no trust.

    TCP links are not encrypted: without keys a publisher is on the loopback, where nothing is; with keys they must be
    asked for by name. `ConfigError` for an unknown kind, and for TCP links of a publisher that has no TCP address.
    """
    is_tcp = parse_address(address).transport == "tcp"
    if expose is None:
        return ("shared_memory", tcp_wire.KIND) if is_tcp and keys is None else ("shared_memory",)
    kinds = check_kinds(expose)
    if tcp_wire.KIND in kinds and not is_tcp:
        raise ConfigError(f"expose={list(expose)} at {address}: TCP links need an address such as tcp://127.0.0.1:5600")
    if tcp_wire.KIND in kinds and keys is not None:
        logger.warning("weights travel unencrypted over TCP links, as asked for; leave out 'tcp' for CurveZMQ alone")
    return kinds


class ChunkServers:
    """See the module; a `ChunkServer`, whose TCP links have threads of their own."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: CurveKeys | None, serves_tcp: bool
    ) -> None:
        self._zmq = ZmqChunkServer(context, address, keys)
        self._tcp: TcpChunkServer | None = None
        self.address = self._zmq.address
        self.socket = self._zmq.socket
        if serves_tcp:
            try:
                self._tcp = TcpChunkServer(parse_address(self.address).host.strip("[]"))
            except BaseException:
                self._zmq.close()
                raise

    @property
    def tickets(self) -> tuple[tuple[str, bytes], ...]:
        """(kind, ticket) of each way besides ZeroMQ."""
        return () if self._tcp is None else ((tcp_wire.KIND, self._tcp.ticket),)

    @property
    def is_sending(self) -> bool:
        """Whether bytes of the snapshot are still on their way out."""
        return self._zmq.is_sending or (self._tcp is not None and self._tcp.is_sending)

    @property
    def has_sent(self) -> bool:
        """Whether ZeroMQ sent bytes of chunks since `hold`: only there they were hashed as well."""
        return self._zmq.has_sent

    @property
    def awaited_index(self) -> int | None:
        """The first chunk that somebody waits for; other threads may ask."""
        awaited = (self._zmq.awaited_index, None if self._tcp is None else self._tcp.awaited_index)
        return min((index for index in awaited if index is not None), default=None)

    def hold(self, snapshot: Snapshot) -> None:
        """Serve this snapshot from now on, and no other."""
        self._zmq.hold(snapshot)
        if self._tcp is not None:
            self._tcp.hold(snapshot)

    def drop(self) -> None:
        """Serve nothing until the next `hold`."""
        self._zmq.drop()
        if self._tcp is not None:
            self._tcp.drop()

    def notify(self, index: int) -> bool:
        """From the packer's thread: chunk `index` is packed. Whether somebody waits for it who needs `answer`."""
        if self._tcp is not None:
            awaited = self._tcp.awaited_index
            if awaited is not None and awaited <= index:
                self._tcp.notify()
        awaited = self._zmq.awaited_index
        return awaited is not None and awaited <= index

    def answer(self) -> None:
        """Answer the requests that are there, and earlier ones whose chunks became ready, without waiting for more."""
        self._zmq.answer()

    def close(self) -> None:
        """Stop serving."""
        if self._tcp is not None:
            self._tcp.close()
        self._zmq.close()
