"""CUDA IPC: engines on the trainer's host read what it packed on its GPU, and copy from device to device.

    exposed = expose(num_bytes)           # source: packs into exposed.device_memory, on its current GPU
    memory = reach(ticket, timeout_s)     # engine: memory.device_view(start_byte, num_bytes)

Or they read its parameters themselves, where they lie (`cuda_ipc_live.expose_live`): the door then hands out a table.

A ticket says which GPU, and where the source hands out the handle (`cuda_driver`): at a socket like that of
`shared_memory`, to processes of the same user, or an allowed one, that know the ticket's token. The engine keeps its
connection for as long as it has the memory open, and the kernel closes it when the engine dies. The source gives the
memory back when its last reader is gone, since CUDA leaves undefined what becomes of one who still reads.

An engine that stages on its own GPU (`WeightSubscriber(..., device="cuda")`) copies once, device to device; one that
stages in host memory copies from the device. Digests are taken of what was written. The source may pack the next
version while a late one reads: its digests are then wrong, and it asks for those tensors over the connection.

On a GPU the checks `cuda_ipc` and `device_delta` of `make gpu-check` show it (seen on an H200). Without one it is
tested with a driver whose "device" is host memory.
"""

import hmac
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightcast.sync import schema
from weightcast.sync.errors import DeadlineExceeded, PeerLost, ReachError, WeightcastError, WireError
from weightcast.sync.host.arena import MAX_ARENA_BYTES
from weightcast.sync.host.doors import TOKEN_BYTES, Door, Open, check_door, host_name, knock
from weightcast.sync.host.packets import Connection
from weightcast.sync.host.server import PacketServer
from weightcast.sync.schema import binary, checked, text, uint
from weightcast.sync.snapshot import allocate_arena
from weightcast.sync.transports.base import ByteArray
from weightcast.sync.transports.cuda_driver import HANDLE_BYTES, UUID_BYTES, DeviceMemory, IpcDriver, find_driver
from weightcast.sync.transports.cuda_ipc_table import DeviceReach, ReachedScattered, Scattered, open_table

KIND = "cuda_ipc"
MAX_TICKET_BYTES = 1024


@dataclass(frozen=True, slots=True)
class CudaIpcTicket:
    """Which device of which host, where its source hands out a handle, and what to say there."""

    host: str = checked(text)
    path: str = checked(text)
    token: bytes = checked(binary(TOKEN_BYTES))
    num_bytes: int = checked(uint(MAX_ARENA_BYTES))
    device: bytes = checked(binary(UUID_BYTES))


@dataclass(frozen=True, slots=True)
class Opened:
    """The source's answer: what the driver opens."""

    num_bytes: int = checked(uint(MAX_ARENA_BYTES))
    handle: bytes = checked(binary(HANDLE_BYTES))


TO_SOURCE: dict[str, type[Any]] = {"open": Open}
_TO_ENGINE: dict[str, type[Any]] = {"opened": Opened, "scattered": Scattered}


class ExposedDeviceMemory:
    """A source's memory on its GPU, and the thread that hands it out; see `expose`.

    `memory` is as much host memory of this process alone, of which pages are taken as they are touched.
    """

    kind = KIND

    def __init__(self, num_bytes: int, driver: IpcDriver, allowed_uids: frozenset[int], base: Path | None) -> None:
        uuid, device = own_device(driver)
        self._door = door = Door(allowed_uids, base)
        ticket = CudaIpcTicket(host_name(), str(door.path), door.token, num_bytes, uuid)
        self.ticket: bytes = schema.pack(KIND, ticket)
        assert len(self.ticket) <= MAX_TICKET_BYTES
        try:
            self._device_memory = driver.allocate(num_bytes, device)
        except BaseException:
            door.listener.close()
            raise
        self.device_memory: torch.Tensor = self._device_memory.tensor
        self.memory: ByteArray = allocate_arena(num_bytes)
        opened = Opened(num_bytes, self._device_memory.handle)
        self._handler = HandsOut(door.token, lambda peer: peer.send("opened", opened))
        self._server = PacketServer(door.listener, TO_SOURCE, self._handler, door.uids)

    def close(self) -> None:
        """Refuse new engines, and give the memory back once nobody has it open. Nobody may pack into it any more."""
        if self._handler.refuse():
            self._door.remove()
            bury(self._handler, self._server, self._device_memory.close)


class HandsOut:
    """What the source's thread does: `answer` for the right token, nothing for anything else.

    Whoever has it stays connected, so that it is known when the memory is nobody's any more.
    """

    def __init__(self, token: bytes, answer: Callable[[Connection], None]) -> None:
        self._token = token
        self._answer = answer
        self._lock = threading.Lock()
        self._readers: set[Connection] = set()
        self._is_closed = False
        self.unread = threading.Event()
        """Set once it is closed and nobody has the memory open."""

    def heard(self, peer: Connection, message: Open) -> bool:
        with self._lock:
            if self._is_closed or not hmac.compare_digest(message.token, self._token):
                return False
            self._readers.add(peer)
        self._answer(peer)
        return True

    def left(self, peer: Connection) -> None:
        with self._lock:
            self._readers.discard(peer)
            self._settle()

    def refuse(self) -> bool:
        """Hand out no more; False when that was so already."""
        with self._lock:
            was_open, self._is_closed = not self._is_closed, True
            self._settle()
            return was_open

    def _settle(self) -> None:
        if self._is_closed and not self._readers:
            self.unread.set()


def bury(handler: HandsOut, server: PacketServer, release: Callable[[], None]) -> None:
    """Give memory back once its last reader is gone, in a thread that waits for that; it ends with the process."""

    def wait() -> None:
        handler.unread.wait()
        server.close()
        release()

    threading.Thread(target=wait, daemon=True, name="weightcast-ipc").start()


def own_driver() -> IpcDriver:
    """The driver that this module takes by default; `ReachError` without a GPU."""
    return find_driver()


def own_device(driver: IpcDriver) -> tuple[bytes, torch.device]:
    """The device that this process works on, and its name on this host."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    found = [(uuid, device) for uuid, device in driver.devices().items() if (device.index or 0) == index]
    if not found:
        raise ReachError(f"the driver has no device {index}; it has {sorted(map(str, driver.devices().values()))}")
    return found[0]


def expose(
    num_bytes: int, *, allowed_uids: Collection[int] = (), base: Path | None = None, driver: IpcDriver | None = None
) -> ExposedDeviceMemory:
    """Memory on this process's current GPU that engines of this host may read. Arguments as in `shared_memory`.

    Raises `StorageError` when there is too little memory, `ReachError` without a GPU, or a safe place for the socket.
    """
    driver = driver if driver is not None else find_driver()
    return ExposedDeviceMemory(num_bytes, driver, frozenset(allowed_uids), base)


class ReachedDeviceMemory(DeviceReach):
    """A source's packed memory on a GPU, opened here; see `reach`."""

    scattered = None

    def __init__(self, memory: DeviceMemory, connection: Connection) -> None:
        super().__init__(memory.tensor.numel(), connection)
        self._memory: DeviceMemory | None = memory

    def device_view(self, start_byte: int, num_bytes: int) -> torch.Tensor:
        """The source's bytes, which may change meanwhile, until `close`. `WireError` when they are not all there."""
        assert self._memory is not None, "the memory was closed"
        if start_byte < 0 or num_bytes < 0 or start_byte + num_bytes > self.num_bytes:
            raise WireError(f"{num_bytes} bytes from {start_byte} on are outside the source's {self.num_bytes} bytes")
        return self._memory.tensor[start_byte : start_byte + num_bytes]

    def close(self) -> None:
        """Let go of the memory, then say so to the source by ending the connection."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory.close()
            self._connection.close()


def read_ticket(ticket: bytes) -> CudaIpcTicket:
    """The ticket, or `WireError` when it cannot be one of `expose`."""
    if len(ticket) > MAX_TICKET_BYTES:
        raise WireError(f"a ticket of {len(ticket)} bytes exceeds the limit of {MAX_TICKET_BYTES}")
    read: CudaIpcTicket = schema.unpack(ticket, {KIND: CudaIpcTicket})
    check_door(read.path)
    if len(read.token) != TOKEN_BYTES or len(read.device) != UUID_BYTES or not read.num_bytes:
        raise WireError(
            f"a ticket with a token of {len(read.token)} bytes, a device of {len(read.device)}, "
            f"for {read.num_bytes} bytes of memory"
        )
    return read


def reach(
    ticket: bytes, timeout_s: float, *, allowed_uids: Collection[int] = (), driver: IpcDriver | None = None
) -> ReachedDeviceMemory | ReachedScattered:
    """The memory behind a ticket, opened, or the parameters that its source exposes.

    The source must be of this process's user or of `allowed_uids`.

    Raises `WireError` for a malformed ticket, and `ReachError` when this process has no GPU or not that one, when the
    source is on another host, of another user, or gone, or when its memory is not what it says.
    """
    read = read_ticket(ticket)
    driver = driver if driver is not None else find_driver()
    device = driver.devices().get(read.device)
    if device is None:
        raise ReachError(
            f"the source's weights are on the GPU {read.device.hex()}, which this process does not see; "
            "let it see that one (CUDA_VISIBLE_DEVICES), or use another transport"
        )
    owners = frozenset(allowed_uids) | {os.geteuid()}
    connection = knock(Path(read.path), read.host, owners, timeout_s)
    try:
        opened, descriptor = _ask(connection, read, timeout_s)
        if isinstance(opened, Scattered):
            assert descriptor is not None
            return open_table(
                opened, descriptor, lambda handle, size: driver.open(handle, size, device), connection, timeout_s
            )
        return ReachedDeviceMemory(driver.open(opened.handle, read.num_bytes, device), connection)
    except BaseException:
        connection.close()
        raise


def _ask(connection: Connection, read: CudaIpcTicket, timeout_s: float) -> tuple[Opened | Scattered, int | None]:
    """The source's answer; a descriptor comes with a table, and with nothing else."""
    deadline_s = time.monotonic() + timeout_s
    try:
        connection.send("open", Open(read.token))
        answer, descriptor = connection.receive(_TO_ENGINE, deadline_s - time.monotonic())
    except DeadlineExceeded:
        raise ReachError(f"the source at {read.path} did not answer within {timeout_s:.1f} s") from None
    except PeerLost:
        raise ReachError(
            f"the source at {read.path} refused: the ticket is of an earlier life of it, this process's user "
            f"{os.geteuid()} is not allowed, or too many ask at once; get a new ticket, or use another transport"
        ) from None
    try:
        _check_answer(answer, descriptor, read)
    except WeightcastError:
        if descriptor is not None:
            os.close(descriptor)
        raise
    return answer, descriptor


def _check_answer(answer: Opened | Scattered, descriptor: int | None, read: CudaIpcTicket) -> None:
    if isinstance(answer, Opened) != (descriptor is None):
        what = "a table without a descriptor" if descriptor is None else "a descriptor, where a handle was expected"
        raise WireError(f"the source at {read.path} sent {what}")
    if answer.num_bytes != read.num_bytes:
        raise ReachError(f"the source at {read.path} has {answer.num_bytes} bytes, its ticket {read.num_bytes}")
    if isinstance(answer, Opened) and len(answer.handle) != HANDLE_BYTES:
        raise ReachError(f"the source at {read.path} has a handle of {len(answer.handle)} bytes, not {HANDLE_BYTES}")
