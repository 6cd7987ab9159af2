"""Bytes of a source that lie here and there on a device: parameters that engines read where they are.

    rows = np.array([...], np.int64)                               # [pieces, TABLE_FIELDS], by where they begin
    scattered = ScatteredBytes(num_bytes, rows, allocations)       # WireError for what reaches outside of them
    scattered.gather(start_byte, num_bytes)                        # as if the source had packed them: a copy
    scattered.locate(starts, num_rows, row_bytes)                  # where such pieces lie, to be read there

A source that packs has all pieces of its chunks one after the other. Here a table says, of each, in which allocation it
lies: rows of so many bytes, at equal distances. Nobody reads an address that this module has not checked.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.digest import LANE_BYTES
from weightcast.sync.errors import WireError
from weightcast.sync.pass_plan import Int64Array

TABLE_FIELDS = 6
"""Of a piece: its first byte as the source would pack it, rows, bytes of each, the number of its allocation, the first
byte there, bytes from row to row."""
MAX_TABLE_ROWS = 1 << 20


class ScatteredBytes:
    """See the module. `allocations` are bytes on one device, which nobody gives back while this is in use."""

    def __init__(self, num_bytes: int, rows: Int64Array, allocations: Sequence[torch.Tensor]) -> None:
        check_table(num_bytes, rows, [memory.numel() for memory in allocations])
        self.num_bytes = num_bytes
        self._rows = rows
        self._allocations = allocations
        self._starts = np.ascontiguousarray(rows[:, 0])
        bases = np.array([memory.data_ptr() for memory in allocations], np.int64)
        self._addresses = bases[rows[:, 3]] + rows[:, 4]

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self._allocations[0].device

    def locate(self, starts: Int64Array, num_rows: Int64Array, row_bytes: Int64Array) -> Int64Array:
        """Of pieces that begin at `starts`: [pieces, 2], the address and the lanes from row to row.

        Zeros where no such piece lies, or a kernel could not read it: then `gather` says what its bytes are.
        """
        found = np.searchsorted(self._starts, starts)
        found[found == len(self._starts)] = 0
        rows = self._rows[found]
        is_there = (rows[:, 0] == starts) & (rows[:, 1] == num_rows) & (rows[:, 2] == row_bytes)
        is_there &= rows[:, 5] % LANE_BYTES == 0
        places: Int64Array = np.stack([self._addresses[found], rows[:, 5] // LANE_BYTES], 1)
        places[~is_there] = 0
        return places

    def gather(self, start_byte: int, num_bytes: int) -> torch.Tensor:
        """A copy of bytes as the source would have packed them. `WireError` when they are not all there."""
        end = start_byte + num_bytes
        if start_byte < 0 or num_bytes < 0 or end > self.num_bytes:
            raise WireError(f"{num_bytes} bytes from {start_byte} on are outside the source's {self.num_bytes} bytes")
        into = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        first = max(0, int(np.searchsorted(self._starts, start_byte, "right")) - 1)
        for number in range(first, int(np.searchsorted(self._starts, end))):
            start, rows, row_bytes = (int(field) for field in self._rows[number, :3])
            begin, stop = max(start, start_byte), min(start + rows * row_bytes, end)
            if begin < stop:
                into[begin - start_byte : stop - start_byte] = self._flat(number)[begin - start : stop - start]
        return into

    def _flat(self, number: int) -> torch.Tensor:
        """A piece's bytes, row after row."""
        _, rows, row_bytes, allocation, first, step = (int(field) for field in self._rows[number])
        memory = self._allocations[allocation]
        if rows == 1 or step == row_bytes:
            return memory[first : first + rows * row_bytes]
        shape, strides = (rows, row_bytes), (step, 1)
        return memory.as_strided(shape, strides, memory.storage_offset() + first).reshape(-1)


def check_table(num_bytes: int, rows: Int64Array, sizes: Sequence[int]) -> None:
    """`WireError` unless every piece lies within its allocation, and they follow each other within `num_bytes`.

    A read past the end of an allocation would end this process's use of the device.
    """
    if rows.ndim != 2 or rows.shape[1] != TABLE_FIELDS or not 0 < len(rows) <= MAX_TABLE_ROWS or not sizes:
        raise WireError(f"a table of {rows.shape} for {len(sizes)} allocations says not where a source's pieces lie")
    starts, num_rows, row_bytes, allocations, firsts, steps = rows.T
    # Numbers come from strangers: nothing may be multiplied before it is known to be small.
    is_right: npt.NDArray[np.bool_] = (rows >= 0).all(1) & (num_rows > 0) & (row_bytes > 0)
    is_right &= (starts < num_bytes) & (row_bytes <= num_bytes) & (allocations < len(sizes))
    _require(is_right, rows)
    held = np.array(sizes, np.int64)[allocations]
    is_right = (num_rows <= (num_bytes - starts) // row_bytes) & (row_bytes <= held)
    _require(is_right, rows)
    is_right = firsts <= held - row_bytes
    _require(is_right, rows)
    is_right = (num_rows == 1) | (steps <= (held - row_bytes - firsts) // np.maximum(num_rows - 1, 1))
    is_right[1:] &= (starts[:-1] + num_rows[:-1] * row_bytes[:-1]) <= starts[1:]
    _require(is_right, rows)


def _require(is_right: npt.NDArray[np.bool_], rows: Int64Array) -> None:
    if not is_right.all():
        number = int(np.flatnonzero(~is_right)[0])
        raise WireError(f"piece {number} of a source's table lies outside of its memory: {rows[number].tolist()}")
