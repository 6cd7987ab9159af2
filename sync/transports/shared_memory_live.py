"""Shared memory without a copy at the source: engines of the host read the trainer's parameters where they lie.

    exposed = expose_live(rows, num_bytes, storages, packed)    # ReachError where the storages cannot be shared
    exposed.ticket                                              # as that of `shared_memory.expose`

A storage that is to be read moves into a file of shared memory, once and by torch itself: every tensor on it has its
values there from then on, whatever holds a bare address of the old memory does not. So it happens only where the
trainer asked for it (`WeightPublisher(..., in_place=True)`). What is shared is whole storages, with what else lies in
them. Engines get a read-only descriptor of each, at the door and with the token of `shared_memory`; nobody else can
find them, for torch removes their names at once.
"""

import contextlib
import hmac
import mmap
import os
import stat
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from weightcast.sync import schema
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.errors import ReachError, WireError
from weightcast.sync.host.arena import Arena, populate
from weightcast.sync.host.doors import Door, Open, host_name
from weightcast.sync.host.packets import Connection
from weightcast.sync.host.server import PacketServer
from weightcast.sync.host_pieces import HostPieces
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.transports.cuda_driver import HANDLE_BYTES
from weightcast.sync.transports.cuda_ipc_table import Scattered, read_table, write_table
from weightcast.sync.transports.shared_memory_wire import KIND, MAX_STORAGES, Ask, SharedMemoryTicket, Storage

_SHM = "/dev/shm"
# What must be left there after all storages moved in: others need some as well.
_ROOM_BYTES = 64 << 20


def share_storages(storages: Sequence[torch.UntypedStorage]) -> list[int]:
    """Move storages into shared memory, those that are not there yet, and return their descriptors, which stay theirs.

    Raises `ReachError` where there are too many, too little shared memory, or pinned ones: then none was moved.
    """
    if len(storages) > MAX_STORAGES:
        raise ReachError(f"the weights lie in {len(storages)} storages; at most {MAX_STORAGES} are shared")
    if torch.cuda.is_available() and any(storage.is_pinned() for storage in storages):
        raise ReachError("weights in pinned memory would no longer be pinned in shared memory")
    num_bytes = sum(storage.nbytes() for storage in storages if not storage.is_shared())
    info = os.statvfs(_SHM)
    if num_bytes and num_bytes + _ROOM_BYTES > info.f_bavail * info.f_frsize:
        raise ReachError(
            f"{_SHM} has {info.f_bavail * info.f_frsize} bytes left for weights of {num_bytes}; mount it larger "
            "(docker run --shm-size), or leave out in_place"
        )
    try:
        # torch has no public name for the descriptor; multiprocessing's reductions take it so.
        return [storage._share_fd_cpu_()[0] for storage in storages]
    except RuntimeError as error:
        raise ReachError(f"torch cannot move the weights into shared memory: {error}") from None


class ExposedPieces:
    """See the module. `packed` is memory of the source's own, for what is not read where it lies."""

    kind = KIND

    def __init__(
        self,
        rows: Int64Array,
        num_bytes: int,
        storages: Sequence[torch.UntypedStorage],
        packed: Arena | None,
        allowed_uids: frozenset[int],
        base: Path | None,
    ) -> None:
        self._storages = storages
        self._packed = packed
        self._descriptors = share_storages(storages)
        sizes = [storage.nbytes() for storage in storages] + ([] if packed is None else [len(packed.memory)])
        self._sizes = sizes
        self._message, self._table = write_table(num_bytes, rows, [bytes(HANDLE_BYTES)] * len(sizes), sizes)
        self._door = door = Door(allowed_uids, base)
        self.ticket: bytes = schema.pack(KIND, SharedMemoryTicket(host_name(), str(door.path), door.token, num_bytes))
        self._known: set[Connection] = set()
        self._server: PacketServer | None = PacketServer(door.listener, {"open": Open, "ask": Ask}, self, door.uids)

    def heard(self, peer: Connection, message: Open | Ask) -> bool:
        """What the door's thread does."""
        if isinstance(message, Open):
            if not hmac.compare_digest(message.token, self._door.token):
                return False
            self._known.add(peer)
            peer.send("scattered", self._message, self._table.descriptor)
            return True
        if peer not in self._known or message.number >= len(self._sizes):
            return False
        if message.number == len(self._descriptors):
            assert self._packed is not None
            peer.send("storage", Storage(self._sizes[-1]), self._packed.descriptor)
            return True
        descriptor = os.open(f"/proc/self/fd/{self._descriptors[message.number]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            peer.send("storage", Storage(self._sizes[message.number]), descriptor)
        finally:
            os.close(descriptor)
        return True

    def left(self, peer: Connection) -> None:
        """It has what it wanted, or is gone."""
        self._known.discard(peer)

    def close(self) -> None:
        """Refuse new engines. Those that have the memory open keep it."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._door.remove()
            self._table.close()
            if self._packed is not None:
                self._packed.close()


def expose_live(
    rows: Int64Array,
    num_bytes: int,
    storages: Sequence[torch.UntypedStorage],
    packed: Arena | None = None,
    *,
    allowed_uids: Collection[int] = (),
    base: Path | None = None,
) -> ExposedPieces:
    """Let engines of this host read pieces (`scattered.TABLE_FIELDS`), whose allocations are `storages`, then `packed`.

    Raises `ReachError` where the storages cannot be shared, `StorageError`.
    """
    return ExposedPieces(rows, num_bytes, storages, packed, frozenset(allowed_uids), base)


class ReachedPieces:
    """A source's own parameters, mapped read-only; a `Reach`."""

    kind = KIND

    def __init__(self, pieces: HostPieces) -> None:
        self.scattered: HostPieces | None = pieces
        self.num_bytes = pieces.num_bytes

    def view(self, start_byte: int, num_bytes: int) -> None:
        """They lie in no one piece."""

    def device_view(self, start_byte: int, num_bytes: int) -> None:
        """They lie on no device."""

    def read(self, start_byte: int, into: ByteArray) -> None:
        """Copy bytes from `start_byte` on, as the source would have packed them."""
        assert self.scattered is not None, "the memory was closed"
        self.scattered.gather(start_byte, into)

    def close(self) -> None:
        """Let go of the memory; it is unmapped when nobody looks at it any more."""
        self.scattered = None


def open_pieces(connection: Connection, message: Scattered, descriptor: int, deadline_s: float) -> ReachedPieces:
    """What a source's answer names, mapped. `ReachError`, `WireError`, `DeadlineExceeded`, `PeerLost`."""
    sizes, rows, _ = read_table(message, descriptor, deadline_s - time.monotonic())
    if len(sizes) > MAX_STORAGES + 1:
        raise WireError(f"a source's weights lie in {len(sizes)} storages; at most {MAX_STORAGES} are opened")
    memories = []
    for number, num_bytes in enumerate(sizes):
        connection.send("ask", Ask(number))
        answer, handed = connection.receive({"storage": Storage}, deadline_s - time.monotonic())
        if handed is None:
            raise ReachError(f"the source handed over no memory for its storage {number}")
        try:
            if answer.num_bytes != num_bytes:
                raise ReachError(f"storage {number} has {answer.num_bytes} bytes, the source's table says {num_bytes}")
            memories.append(_map(handed, num_bytes, deadline_s))
        finally:
            os.close(handed)
    return ReachedPieces(HostPieces(message.num_bytes, rows, memories))


def _map(descriptor: int, num_bytes: int, deadline_s: float) -> ByteArray:
    """A storage's memory, read-only. Torch's is not sealed: its trainer, who may, has no reason to cut it short."""
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_size < num_bytes or not num_bytes:
        raise ReachError(f"what was handed over for a storage of {num_bytes} bytes is a file of {info.st_size} bytes")
    mapping = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with contextlib.suppress(OSError):
        populate(mapping, deadline_s)
    return np.frombuffer(mapping, np.uint8)
