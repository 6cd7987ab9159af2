"""How a source tells of parameters that engines read where they lie: handles of allocations, and a table of pieces.

    table = write_table(num_bytes, rows, handles, sizes)            # source: table.message, table.descriptor
    reached = open_table(message, descriptor, open_allocation, connection, timeout_s)      # engine

Both lists may be long, so they come in sealed memory whose descriptor goes with the message; their lengths are bounded,
every handle's size is checked by the driver that opens it, every piece against the sizes (`scattered`).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.errors import WireError
from weightcast.sync.host.arena import MAX_ARENA_BYTES, Arena, map_arena
from weightcast.sync.host.packets import Connection
from weightcast.sync.host.server import close_in_children
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.scattered import MAX_TABLE_ROWS, TABLE_FIELDS, ScatteredBytes
from weightcast.sync.schema import checked, uint
from weightcast.sync.transports.cuda_driver import HANDLE_BYTES, DeviceMemory

MAX_ALLOCATIONS = 1 << 16
_SIZE_BYTES = 8
_ROW_BYTES = TABLE_FIELDS * 8


@dataclass(frozen=True, slots=True)
class Scattered:
    """A source's answer in place of `Opened`. A descriptor comes with it, of memory that has these lists.

    First the allocations' sizes (int64), then the table's rows (`scattered.TABLE_FIELDS`, int64), then the handles.
    """

    num_bytes: int = checked(uint(MAX_ARENA_BYTES))
    num_allocations: int = checked(uint(MAX_ALLOCATIONS))
    num_rows: int = checked(uint(MAX_TABLE_ROWS))

    @property
    def table_bytes(self) -> int:
        """Of the memory that comes with it."""
        return self.num_allocations * (HANDLE_BYTES + _SIZE_BYTES) + self.num_rows * _ROW_BYTES


def write_table(num_bytes: int, rows: Int64Array, handles: Sequence[bytes], sizes: Sequence[int]) -> tuple[
    Scattered, Arena
]:  # fmt: skip
    """The message, and the sealed memory that goes with it."""
    assert 0 < len(handles) <= MAX_ALLOCATIONS and 0 < len(rows) <= MAX_TABLE_ROWS
    message = Scattered(num_bytes, len(handles), len(rows))
    arena = Arena(message.table_bytes)
    raw = np.array(sizes, "<i8").tobytes() + rows.astype("<i8").tobytes() + b"".join(handles)
    arena.memory[:] = np.frombuffer(raw, np.uint8)
    return message, arena


def read_table(message: Scattered, descriptor: int, timeout_s: float) -> tuple[list[int], Int64Array, list[bytes]]:
    """(sizes, rows, handles); the descriptor is closed. `ReachError` for memory that is not what was said."""
    try:
        raw = map_arena(descriptor, message.table_bytes, timeout_s).tobytes()
    finally:
        os.close(descriptor)
    sizes = np.frombuffer(raw, "<i8", message.num_allocations)
    rows = np.frombuffer(raw, "<i8", message.num_rows * TABLE_FIELDS, len(sizes) * _SIZE_BYTES)
    if not len(sizes) or (sizes <= 0).any() or (sizes > MAX_ARENA_BYTES).any():
        raise WireError(f"a source's table has allocations of {sizes[:10].tolist()} bytes")
    handles = raw[len(sizes) * _SIZE_BYTES + rows.nbytes :]
    cut = [handles[start : start + HANDLE_BYTES] for start in range(0, len(handles), HANDLE_BYTES)]
    return sizes.tolist(), rows.reshape(-1, TABLE_FIELDS).astype(np.int64), cut


class DeviceReach(ABC):
    """What every way to a source's memory on a GPU does alike. Used and closed by one thread."""

    kind = "cuda_ipc"

    def __init__(self, num_bytes: int, connection: Connection) -> None:
        self.num_bytes = num_bytes
        self._connection = connection
        close_in_children(self)

    @abstractmethod
    def device_view(self, start_byte: int, num_bytes: int) -> torch.Tensor:
        """The source's bytes on the device; `WireError` when they are not all there."""

    def view(self, start_byte: int, num_bytes: int) -> None:
        """They lie in no host memory."""
        return None

    def read(self, start_byte: int, into: ByteArray) -> None:
        """Copy bytes from the device to the host, as many as `into` takes; they are there when this returns."""
        torch.from_numpy(into).copy_(self.device_view(start_byte, len(into)))

    def close_descriptors(self) -> None:
        """A forked child's copy would keep the source's memory after this process's end."""
        self._connection.close()


class ReachedScattered(DeviceReach):
    """A source's own parameters on a GPU, opened here; a `Reach`."""

    def __init__(self, scattered: ScatteredBytes, release: Callable[[], None], connection: Connection) -> None:
        super().__init__(scattered.num_bytes, connection)
        self.scattered: ScatteredBytes | None = scattered
        self._release = release

    def device_view(self, start_byte: int, num_bytes: int) -> torch.Tensor:
        """The source's bytes as they are now, copied together. `WireError` when they are not all there."""
        assert self.scattered is not None, "the memory was closed"
        return self.scattered.gather(start_byte, num_bytes)

    def close(self) -> None:
        """Let go of all allocations, then say so to the source by ending the connection."""
        if self.scattered is not None:
            self.scattered = None
            self._release()
            self._connection.close()


def open_table(
    message: Scattered,
    descriptor: int,
    open_allocation: Callable[[bytes, int], DeviceMemory],
    connection: Connection,
    timeout_s: float,
) -> ReachedScattered:
    """What a source's answer names, opened. `ReachError` and `WireError` leave nothing open but the connection."""
    sizes, rows, handles = read_table(message, descriptor, timeout_s)
    with ExitStack() as stack:
        opened: list[torch.Tensor] = []
        for handle, size in zip(handles, sizes, strict=True):
            memory = open_allocation(handle, size)
            stack.callback(memory.close)
            opened.append(memory.tensor)
        scattered = ScatteredBytes(message.num_bytes, rows, opened)
        return ReachedScattered(scattered, stack.pop_all().close, connection)
