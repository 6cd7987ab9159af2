"""Shared memory: engines on the trainer's host read a source's arena where it lies, and copy once.

    exposed = expose(num_bytes)           # source: exposed.memory is the arena, exposed.ticket says how to get in
    memory = reach(ticket, timeout_s)     # engine: memory.view(start_byte, num_bytes)

The arena has no name in the file system. A thread of the source hands a read-only descriptor of it to whoever is of
the same user (or an allowed one), reaches the socket in a folder of that user's own, and knows the ticket's token. So
nobody can put something else in its place, and when a process is killed nothing stays but that folder and its dead
socket, which the next source of the user removes.
"""

import hmac
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightcast.sync import schema
from weightcast.sync.errors import DeadlineExceeded, PeerLost, ReachError, WireError
from weightcast.sync.host.arena import Arena, map_arena
from weightcast.sync.host.doors import Door, Open, host_name, knock
from weightcast.sync.host.packets import Connection
from weightcast.sync.host.server import PacketServer
from weightcast.sync.transports.cuda_ipc_table import Scattered
from weightcast.sync.transports.shared_memory_live import ReachedPieces, open_pieces
from weightcast.sync.transports.shared_memory_wire import (
    KIND,
    MAX_TICKET_BYTES,
    Opened,
    SharedMemoryTicket,
    read_ticket,
)

_TO_SOURCE: dict[str, type[Any]] = {"open": Open}
_TO_ENGINE: dict[str, type[Any]] = {"opened": Opened, "scattered": Scattered}


class ExposedMemory:
    """A source's arena, and the thread that hands it out; see `expose`."""

    kind = KIND
    device_memory = None

    def __init__(self, num_bytes: int, allowed_uids: frozenset[int], base: Path | None) -> None:
        self._arena = Arena(num_bytes)
        self.memory: npt.NDArray[np.uint8] = self._arena.memory
        self._door = door = Door(allowed_uids, base)
        ticket = SharedMemoryTicket(host_name(), str(door.path), door.token, num_bytes)
        self.ticket: bytes = schema.pack(KIND, ticket)
        assert len(self.ticket) <= MAX_TICKET_BYTES
        handler = _HandsOut(door.token, self._arena)
        self._server: PacketServer | None = PacketServer(door.listener, _TO_SOURCE, handler, door.uids)

    def close(self) -> None:
        """Refuse new engines. Those that have the memory open keep it, and so does whoever has `memory`."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._door.remove()
            self._arena.close()


class _HandsOut:
    """What the source's thread does: a descriptor for the right token, nothing for anything else."""

    def __init__(self, token: bytes, arena: Arena) -> None:
        self._token = token
        self._arena = arena

    def heard(self, peer: Connection, message: Open) -> bool:
        if hmac.compare_digest(message.token, self._token):
            peer.send("opened", Opened(len(self._arena.memory)), self._arena.descriptor)
        return False

    def left(self, peer: Connection) -> None:
        pass


def expose(num_bytes: int, *, allowed_uids: Collection[int] = (), base: Path | None = None) -> ExposedMemory:
    """An arena of `num_bytes` that engines of this host may read; all of its memory is taken at once.

    `allowed_uids` may read it besides this process's own user. `base` is where the folder of its socket is made (by
    default `XDG_RUNTIME_DIR`, or the folder for temporary files), which both sides must see under one path.
    Raises `StorageError` when there is too little memory, `ReachError` when there is no safe place for the socket.
    """
    return ExposedMemory(num_bytes, frozenset(allowed_uids), base)


class ReachedMemory:
    """A source's arena, mapped read-only; see `reach`."""

    kind = KIND
    scattered = None

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._memory: npt.NDArray[np.uint8] | None = memory
        self.num_bytes = len(memory)

    def view(self, start_byte: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A read-only view of the source's memory, which may change under it. `WireError` when it is not all there."""
        assert self._memory is not None, "the memory was closed"
        if start_byte < 0 or num_bytes < 0 or start_byte + num_bytes > self.num_bytes:
            raise WireError(f"{num_bytes} bytes from {start_byte} on are outside the source's {self.num_bytes} bytes")
        return self._memory[start_byte : start_byte + num_bytes]

    def device_view(self, start_byte: int, num_bytes: int) -> None:
        """It lies on no device."""

    def read(self, start_byte: int, into: npt.NDArray[np.uint8]) -> None:
        """Copy bytes from `start_byte` on, as many as `into` takes."""
        np.copyto(into, self.view(start_byte, len(into)))

    def close(self) -> None:
        """Let go of the memory; it is unmapped when the last view of it is gone."""
        self._memory = None


def reach(ticket: bytes, timeout_s: float, *, allowed_uids: Collection[int] = ()) -> ReachedMemory | ReachedPieces:
    """The memory behind a ticket, mapped; its pages too, as far as `timeout_s` allows.

    That is what the source packs into, or, where it packs nothing, its parameters themselves (`shared_memory_live`).

    The source must be of this process's user or of `allowed_uids`. Raises `WireError` for a malformed ticket, and
    `ReachError` when the source is on another host, of another user, or gone, or when its memory is not what it says.
    """
    read = read_ticket(ticket)
    deadline_s = time.monotonic() + timeout_s
    owners = frozenset(allowed_uids) | {os.geteuid()}
    connection = knock(Path(read.path), read.host, owners, timeout_s)
    try:
        connection.send("open", Open(read.token))
        answer, descriptor = connection.receive(_TO_ENGINE, deadline_s - time.monotonic())
        if isinstance(answer, Scattered):
            if descriptor is None:
                raise ReachError(f"the source at {read.path} handed over no table")
            try:
                _check_size(read, answer.num_bytes)
            except ReachError:
                os.close(descriptor)
                raise
            return open_pieces(connection, answer, descriptor, deadline_s)
    except DeadlineExceeded:
        raise ReachError(f"the source at {read.path} did not answer within {timeout_s:.1f} s") from None
    except PeerLost:
        raise ReachError(
            f"the source at {read.path} refused: the ticket is of an earlier life of it, this process's user "
            f"{os.geteuid()} is not allowed, or too many ask at once; get a new ticket, or use another transport"
        ) from None
    finally:
        connection.close()
    if descriptor is None:
        raise ReachError(f"the source at {read.path} handed over no memory")
    try:
        _check_size(read, answer.num_bytes)
        return ReachedMemory(map_arena(descriptor, read.num_bytes, deadline_s - time.monotonic()))
    finally:
        os.close(descriptor)


def _check_size(ticket: SharedMemoryTicket, num_bytes: int) -> None:
    if num_bytes != ticket.num_bytes:
        raise ReachError(f"the source at {ticket.path} has {num_bytes} bytes, its ticket {ticket.num_bytes}")
