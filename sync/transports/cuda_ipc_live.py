"""CUDA IPC without a copy at the source: engines read the trainer's parameters where they lie.

    exposed = expose_live(pieces, num_bytes, lives)      # on this process's current GPU; ReachError where none can be
    exposed.packed_starts                                # of pieces that cannot: where the source packs them instead
    exposed.ticket                                       # as that of `cuda_ipc.expose`

Torch's allocator takes its memory in segments, and CUDA shares a segment or nothing: whoever opens one sees whatever
else the trainer has in it, activations and optimizer state too, and could write there. So it is handed out as packed
memory is, to processes of the same user that know the ticket's token, and only where the trainer asked for it
(`WeightPublisher(..., in_place=True)`). Memory that holds nothing but the weights is what `cuda_ipc.expose` is for.

Pieces that cannot be read so (weights that are made for each version or cast, memory that the driver does not share)
lie packed in an allocation of their own. Tensors are kept for as long as they are exposed and an engine has their
memory open, whatever the trainer does with its parameters: CUDA leaves undefined what becomes of one who reads memory
that was given back. So a trainer that moves its weights elsewhere has their memory back with the next version.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from weightcast.sync import schema
from weightcast.sync.chunks import ALIGNMENT_BYTES
from weightcast.sync.digest import LANE_BYTES
from weightcast.sync.errors import ReachError
from weightcast.sync.host.doors import Door, host_name
from weightcast.sync.host.packets import Connection
from weightcast.sync.host.server import PacketServer
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.scattered import TABLE_FIELDS
from weightcast.sync.transports import cuda_ipc
from weightcast.sync.transports.cuda_driver import Allocation, DeviceMemory, IpcDriver
from weightcast.sync.transports.cuda_ipc_table import MAX_ALLOCATIONS, write_table

PIECE_FIELDS = 5
"""First byte as it would be packed, rows, bytes of each, the address (0: it cannot be read there), bytes from row to
row."""


class _Allocations:
    """Those that addresses were found in, asked of the driver once each."""

    def __init__(self, driver: IpcDriver, device: torch.device) -> None:
        self.listed: list[Allocation] = []
        self.refusals: Counter[str] = Counter()
        self._driver = driver
        self._device = device
        self._starts: list[int] = []
        self._numbers: list[int] = []

    def find(self, address: int, num_bytes: int) -> int | None:
        """The number of the allocation with all of these bytes; None where there is none that can be shared."""
        place = bisect.bisect_right(self._starts, address) - 1
        number = self._numbers[place] if place >= 0 else None
        if number is None or address >= self._end(number):
            try:
                shared = self._driver.share(address, self._device)
            except ReachError as error:
                self.refusals[str(error)] += 1
                return None
            number = self._add(shared)
        return number if number is not None and address + num_bytes <= self._end(number) else None

    def _add(self, shared: Allocation) -> int | None:
        if len(self.listed) + 1 >= MAX_ALLOCATIONS:
            self.refusals[f"there are more than {MAX_ALLOCATIONS} allocations"] += 1
            return None
        self.listed.append(shared)
        place = bisect.bisect(self._starts, shared.address)
        self._starts.insert(place, shared.address)
        self._numbers.insert(place, len(self.listed) - 1)
        return len(self.listed) - 1

    def _end(self, number: int) -> int:
        return self.listed[number].address + self.listed[number].num_bytes


class ExposedLive:
    """See the module.

    `places` has a row a piece: the address that it is read at, lanes from row to row; zeros where those are no number.
    `packed_starts` says where in `packed` those begin that the source must pack there; -1 for all others.
    """

    kind = cuda_ipc.KIND

    def __init__(
        self,
        pieces: Int64Array,
        num_bytes: int,
        lives: Sequence[torch.Tensor],
        driver: IpcDriver,
        allowed_uids: frozenset[int],
        base: Path | None,
    ) -> None:
        uuid, device = cuda_ipc.own_device(driver)
        found = _Allocations(driver, device)
        rows = np.zeros((len(pieces), TABLE_FIELDS), np.int64)
        rows[:, :3], rows[:, 5] = pieces[:, :3], pieces[:, 4]
        self.packed_starts, packed_bytes = _find_all(found, pieces, rows)
        self.refusals = dict(found.refusals)
        if (self.packed_starts >= 0).all():
            why = next(iter(self.refusals), f"none of them lies on {device}, as it is to be read")
            raise ReachError(f"engines cannot read the weights where they lie: {why}")
        listed = [(held.handle, held.num_bytes, held.address) for held in found.listed]
        self._packed: DeviceMemory | None = None
        if packed_bytes:
            self._packed = driver.allocate(packed_bytes, device)
            listed.append((self._packed.handle, packed_bytes, self._packed.tensor.data_ptr()))
        addresses = np.array([address for _, _, address in listed], np.int64)[rows[:, 3]] + rows[:, 4]
        self.places = np.stack([addresses, rows[:, 5] // LANE_BYTES], 1)
        self.places[rows[:, 5] % LANE_BYTES != 0] = 0
        self._lives: Sequence[torch.Tensor] = lives
        message, self._table = write_table(num_bytes, rows, [one[0] for one in listed], [one[1] for one in listed])
        self._door = door = Door(allowed_uids, base)
        ticket = cuda_ipc.CudaIpcTicket(host_name(), str(door.path), door.token, num_bytes, uuid)
        self.ticket: bytes = schema.pack(cuda_ipc.KIND, ticket)
        self._handler = cuda_ipc.HandsOut(door.token, _answer(message, self._table.descriptor))
        self._server = PacketServer(door.listener, cuda_ipc.TO_SOURCE, self._handler, door.uids)

    @property
    def packed(self) -> torch.Tensor | None:
        """Memory for the pieces that are packed."""
        return None if self._packed is None else self._packed.tensor

    def close(self) -> None:
        """Refuse new engines; let go of the parameters, and of what was packed, once nobody has it open."""
        if self._handler.refuse():
            self._door.remove()
            cuda_ipc.bury(self._handler, self._server, self._release)

    def _release(self) -> None:
        self._lives = ()
        self._table.close()
        if self._packed is not None:
            self._packed.close()


def _find_all(found: _Allocations, pieces: Int64Array, rows: Int64Array) -> tuple[Int64Array, int]:
    """Fill in where pieces lie; (where those are packed that lie nowhere, or -1, bytes of all these)."""
    packed_starts, end = np.full(len(pieces), -1, np.int64), 0
    for number, (_, num_rows, row_bytes, address, step) in enumerate(pieces.tolist()):
        extent = (num_rows - 1) * step + row_bytes
        place = found.find(address, extent) if address else None
        if place is None:
            packed_starts[number] = end
            rows[number, 4:] = end, row_bytes
            end += -(-num_rows * row_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        else:
            rows[number, 3:5] = place, address - found.listed[place].address
    rows[packed_starts >= 0, 3] = len(found.listed)
    return packed_starts, end


def _answer(message: object, descriptor: int) -> Callable[[Connection], None]:
    return lambda peer: peer.send("scattered", message, descriptor)


def expose_live(
    pieces: Int64Array,
    num_bytes: int,
    lives: Sequence[torch.Tensor],
    *,
    allowed_uids: Collection[int] = (),
    base: Path | None = None,
    driver: IpcDriver | None = None,
) -> ExposedLive:
    """Let engines of this host read pieces ([pieces, PIECE_FIELDS], in order) of `lives`, tensors on this GPU.

    Raises `ReachError` without a GPU, or where no piece can be read in place; `StorageError`.
    """
    assert pieces.ndim == 2 and pieces.shape[1] == PIECE_FIELDS
    driver = driver if driver is not None else cuda_ipc.own_driver()
    return ExposedLive(pieces, num_bytes, lives, driver, frozenset(allowed_uids), base)


def find_device() -> torch.device:
    """The device whose weights `expose_live` takes; `ReachError` without one."""
    return cuda_ipc.own_device(cuda_ipc.own_driver())[1]
