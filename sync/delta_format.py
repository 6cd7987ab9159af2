"""The form of a delta: which elements of an array changed, and to what. Lossless, and safe to apply twice.

A delta is found between two states of one array, element by element. Positions are gaps of one byte; values are the
low byte of the *new* element, from which the receiver finds the step to it, or, where the step does not fit a byte,
the whole element. So an element that is new already stays as it is: an apply that was torn is healed by another.

    header   itemsize, number of elements, of changes, of gap bytes, of exceptions
    values   the whole new element of each exception
    ordinals the number, among the changes, of each exception; u32, rising
    gaps     b < 255: skip b elements, the next one changed; 255: skip 255
    low      the low byte of each changed element

Nothing of it is believed before `parse_delta` has looked at all of it: a sparse update with an index out of range is
a write to foreign memory.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from weightcast.sync.errors import WireError

ByteArray: TypeAlias = npt.NDArray[np.uint8]
ElementArray: TypeAlias = npt.NDArray[np.unsignedinteger]

SKIP = 255
MAX_ELEMENTS = 1 << 31
ELEMENT_TYPES: dict[int, "np.dtype[np.unsignedinteger]"] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
_HEADER = struct.Struct("<B3x4I4x")
HEADER_BYTES = _HEADER.size
_ORDINAL = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta's parts; the arrays may be views of one payload."""

    itemsize: int
    num_elements: int
    values: ElementArray
    ordinals: npt.NDArray[np.uint32]
    gaps: ByteArray
    low: ByteArray

    @property
    def num_changes(self) -> int:
        """Elements that changed."""
        return len(self.low)

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload."""
        return HEADER_BYTES + sum(part.nbytes for part in (self.values, self.ordinals, self.gaps, self.low))

    def to_bytes(self) -> bytes:
        """The payload."""
        header = _HEADER.pack(self.itemsize, self.num_elements, len(self.low), len(self.gaps), len(self.values))
        return b"".join((header, self.values.tobytes(), self.ordinals.tobytes(), self.gaps.data, self.low.data))

    def positions(self) -> npt.NDArray[np.int64]:
        """The number of each changed element, rising."""
        is_change = self.gaps != SKIP
        # Each byte moves past what it skips and, unless it only skips, past the element that it ends on.
        ends = np.cumsum(self.gaps + is_change.astype(np.int64))
        positions: npt.NDArray[np.int64] = ends[is_change] - 1
        return positions


def parse_delta(payload: bytes | memoryview | ByteArray, itemsize: int, num_elements: int) -> Delta:
    """The delta in `payload` for an array of `num_elements` elements of `itemsize` bytes; checked in full.

    Raises `WireError` when it is malformed or made for another array.
    """
    raw = np.frombuffer(payload, np.uint8)
    if len(raw) < HEADER_BYTES:
        raise WireError(f"a delta has at least {HEADER_BYTES} bytes, got {len(raw)}; it is not used")
    found_itemsize, found_elements, num_changes, num_gaps, num_exceptions = _HEADER.unpack(raw[:HEADER_BYTES].tobytes())
    if (found_itemsize, found_elements) != (itemsize, num_elements) or itemsize not in ELEMENT_TYPES:
        raise WireError(
            f"a delta for {found_elements} elements of {found_itemsize} bytes does not fit {num_elements} elements of "
            f"{itemsize} bytes; it is not used"
        )
    expected = HEADER_BYTES + num_exceptions * (itemsize + _ORDINAL.itemsize) + num_gaps + num_changes
    if len(raw) != expected or not num_exceptions <= num_changes <= num_gaps:
        raise WireError(
            f"a delta of {len(raw)} bytes says that it has {num_changes} changes, {num_gaps} gap bytes and "
            f"{num_exceptions} exceptions, which take {expected} bytes; it is not used"
        )
    ends = np.cumsum(
        [HEADER_BYTES, num_exceptions * itemsize, num_exceptions * _ORDINAL.itemsize, num_gaps, num_changes]
    )
    values, ordinals, gaps, low = (raw[start:end] for start, end in pairwise(ends))
    delta = Delta(itemsize, num_elements, values.view(ELEMENT_TYPES[itemsize]), ordinals.view(_ORDINAL), gaps, low)
    _check_places(delta)
    return delta


def _check_places(delta: Delta) -> None:
    num_skips = int(np.count_nonzero(delta.gaps == SKIP))
    if len(delta.gaps) - num_skips != delta.num_changes:
        raise WireError(
            f"a delta of {delta.num_changes} changes has {len(delta.gaps) - num_skips} places; it is not used"
        )
    reach = int(delta.gaps.sum(dtype=np.int64)) + delta.num_changes
    if reach > delta.num_elements or (len(delta.gaps) and delta.gaps[-1] == SKIP):
        raise WireError(
            f"a delta reaches to element {reach} of an array of {delta.num_elements}, or past its last change; "
            "it is not used"
        )
    ordinals = delta.ordinals.astype(np.int64)
    if len(ordinals) and (ordinals[-1] >= delta.num_changes or bool((np.diff(ordinals) <= 0).any())):
        raise WireError(
            f"a delta's exceptions must rise and stay below its {delta.num_changes} changes, got up to "
            f"{int(ordinals.max())}; it is not used"
        )
