"""What a source serves its chunks with: a ZeroMQ socket, and TCP links and broadcasts where those were asked for.

    kinds = choose_kinds(expose, address, keys)       # what to expose where the user did not say
    servers = ChunkServers(context, address, keys, rank, kinds, lost_after_s)

All serve the same snapshot; an engine that has the ticket of the one may always ask the other.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zmq

from weightcast.sync.errors import ConfigError
from weightcast.sync.records import Ticket
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports import collective_plan, tcp_wire
from weightcast.sync.transports.reaches import check_kinds
from weightcast.sync.transports.tcp_server import TcpChunkServer
from weightcast.sync.transports.zmq_chunks import ZmqChunkServer
from weightcast.sync.transports.zmq_sockets import CurveKeys, parse_address

if TYPE_CHECKING:
    from weightcast.sync.transports.collective_server import BroadcastServer

logger = logging.getLogger(__name__)

_UNENCRYPTED = {
    tcp_wire.KIND: "TCP links",
    collective_plan.KIND: "broadcasts",
    collective_plan.NCCL_KIND: "broadcasts",
}


def choose_kinds(expose: Sequence[str] | None, address: str, keys: CurveKeys | None) -> tuple[str, ...]:
    """The kinds to expose; None leaves the choice to us: what is fast and needs no trust.

    TCP links are not encrypted: without keys a publisher is on the loopback, where nothing is; with keys they must be
    asked for by name, as broadcasts always must, which are not encrypted either. `ConfigError` for an unknown kind, and
    for TCP links or broadcasts of a publisher that has no TCP address.
    """
    is_tcp = parse_address(address).transport == "tcp"
    if expose is None:
        return ("shared_memory", tcp_wire.KIND) if is_tcp and keys is None else ("shared_memory",)
    kinds = check_kinds(expose)
    for kind, what in _UNENCRYPTED.items():
        if kind in kinds and not is_tcp:
            raise ConfigError(
                f"expose={list(expose)} at {address}: {what} need an address such as tcp://127.0.0.1:5600"
            )
        if kind in kinds and keys is not None:
            logger.warning(
                "weights travel unencrypted over %s, as asked for; leave out %r for CurveZMQ alone", what, kind
            )
    if {collective_plan.KIND, collective_plan.NCCL_KIND} <= set(kinds):
        raise ConfigError(f"expose={list(expose)}: broadcasts go over Gloo or over NCCL; leave out one of them")
    return kinds


class ChunkServers:
    """See the module; a `ChunkServer`, whose TCP links and broadcasts have threads of their own."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: CurveKeys | None,
        rank: int,
        kinds: Sequence[str],
        lost_after_s: float,
    ) -> None:
        self._rank = rank
        self._zmq = ZmqChunkServer(context, address, keys)
        self._tcp: TcpChunkServer | None = None
        self.broadcasts: BroadcastServer | None = None
        self.address = self._zmq.address
        self.socket = self._zmq.socket
        try:
            host = parse_address(self.address).host.strip("[]")
            if tcp_wire.KIND in kinds:
                self._tcp = TcpChunkServer(host)
            self.broadcasts = _make_broadcasts(rank, host, kinds, lost_after_s)
        except BaseException:
            self.close()
            raise

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """To each way besides ZeroMQ; that to broadcasts is another one with every version that is held."""
        tcp = () if self._tcp is None else (Ticket(self._rank, tcp_wire.KIND, self._tcp.ticket),)
        return (*tcp, *self.early_tickets)

    @property
    def early_tickets(self) -> tuple[Ticket, ...]:
        """To ways that engines prepare before a version is announced."""
        if self.broadcasts is None:
            return ()
        return (Ticket(self._rank, collective_plan.KIND, self.broadcasts.ticket),)

    @property
    def is_sending(self) -> bool:
        """Whether bytes of the snapshot are still on their way out."""
        others = (self._tcp, self.broadcasts)
        return self._zmq.is_sending or any(server is not None and server.is_sending for server in others)

    @property
    def has_sent(self) -> bool:
        """Whether chunks were sent since `hold` that were hashed as well: by ZeroMQ or a broadcast."""
        return self._zmq.has_sent or (self.broadcasts is not None and self.broadcasts.has_sent)

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
        if self.broadcasts is not None:
            self.broadcasts.hold(snapshot)

    def drop(self) -> None:
        """Serve nothing until the next `hold`."""
        self._zmq.drop()
        if self._tcp is not None:
            self._tcp.drop()
        if self.broadcasts is not None:
            self.broadcasts.drop()

    def notify(self, index: int) -> bool:
        """From the packer's thread: chunk `index` is packed. Whether somebody waits for it who needs `answer`."""
        if self._tcp is not None:
            awaited = self._tcp.awaited_index
            if awaited is not None and awaited <= index:
                self._tcp.notify()
        if self.broadcasts is not None:
            self.broadcasts.notify(index)
        awaited = self._zmq.awaited_index
        return awaited is not None and awaited <= index

    def answer(self) -> None:
        """Answer the requests that are there, and earlier ones whose chunks became ready, without waiting for more."""
        self._zmq.answer()

    def close(self) -> None:
        """Stop serving."""
        if self.broadcasts is not None:
            self.broadcasts.close()
        if self._tcp is not None:
            self._tcp.close()
        self._zmq.close()


def _make_broadcasts(rank: int, host: str, kinds: Sequence[str], lost_after_s: float) -> "BroadcastServer | None":
    if not {collective_plan.KIND, collective_plan.NCCL_KIND} & set(kinds):
        return None
    # torch.distributed is not there in every build of torch, and takes a while.
    from weightcast.sync.transports.collective_server import BroadcastServer

    return BroadcastServer(rank, host, "nccl" if collective_plan.NCCL_KIND in kinds else "gloo", lost_after_s)
