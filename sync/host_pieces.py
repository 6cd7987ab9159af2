"""Bytes of a source that lie here and there in its own memory, which this process has mapped: parameters, read there.

    pieces = HostPieces(num_bytes, rows, memories)         # WireError for what reaches outside of them
    pieces.gather(start_byte, into)                        # as if the source had packed them: a copy
    pieces.locate(start_byte, num_rows, row_bytes)         # where one of them is to be read

As `scattered`, whose table this is and whose checks, for memory of the host.
"""

from collections.abc import Sequence

import numpy as np

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.errors import WireError
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.scattered import check_table


class HostPieces:
    """See the module. `memories` are read-only, and stay mapped as long as this is used."""

    def __init__(self, num_bytes: int, rows: Int64Array, memories: Sequence[ByteArray]) -> None:
        check_table(num_bytes, rows, [len(memory) for memory in memories])
        self.num_bytes = num_bytes
        self._rows = rows
        self._memories = memories
        self._starts = np.ascontiguousarray(rows[:, 0])
        self._addresses = np.array([memory.ctypes.data for memory in memories], np.int64)[rows[:, 3]] + rows[:, 4]

    def locate(self, start_byte: int, num_rows: int, row_bytes: int) -> tuple[int, int] | None:
        """(address, bytes from row to row) of the piece that begins at `start_byte`; None where there is none."""
        number = int(np.searchsorted(self._starts, start_byte))
        if number == len(self._rows) or self._rows[number, :3].tolist() != [start_byte, num_rows, row_bytes]:
            return None
        return int(self._addresses[number]), int(self._rows[number, 5])

    def gather(self, start_byte: int, into: ByteArray) -> None:
        """Copy bytes as the source would have packed them, as many as `into` takes. `WireError` when it has fewer."""
        end = start_byte + len(into)
        if start_byte < 0 or end > self.num_bytes:
            raise WireError(f"{len(into)} bytes from {start_byte} on are outside the source's {self.num_bytes} bytes")
        into[:] = 0
        first = max(0, int(np.searchsorted(self._starts, start_byte, "right")) - 1)
        for number in range(first, int(np.searchsorted(self._starts, end))):
            start, num_rows, row_bytes, memory, offset, step = self._rows[number].tolist()
            begin, stop = max(start, start_byte), min(start + num_rows * row_bytes, end)
            if begin < stop:
                raw = np.lib.stride_tricks.as_strided(
                    self._memories[memory][offset:], (num_rows, row_bytes), (step, 1), writeable=False
                )
                into[begin - start_byte : stop - start_byte] = raw.reshape(-1)[begin - start : stop - start]
