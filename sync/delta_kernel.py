"""The compiled loops of the delta codec, where a C compiler was there at install; `delta_codec` does without.

What is handed to the library has been checked before.
"""

import ctypes
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from weightcast.sync.compiled import LEVELS, load_library
from weightcast.sync.delta_format import HEADER_BYTES, SKIP, ByteArray, Delta, ElementArray

# A block is compared before its changes are counted: it may run past the limit by as much as its elements take.
_BLOCK_BYTES = 64


class _Found(ctypes.Structure):
    """`found_t` of the C file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gaps", "low", "values", "ordinals")),
        *((name, ctypes.c_size_t) for name in ("max_bytes", "num_changes", "num_gaps", "num_exceptions", "next")),
    )


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    library = load_library("_delta_kernel")
    if library is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.weightcast_delta_level.argtypes = []
    library.weightcast_delta_encode.argtypes = [ctypes.c_int, size, pointer, pointer, size, ctypes.POINTER(_Found)]
    library.weightcast_delta_apply.argtypes = [size, pointer, pointer, size, pointer, pointer, pointer, size]
    library.weightcast_delta_apply.restype = None
    return library


def is_available() -> bool:
    """Whether the library was built."""
    return _load() is not None


def level() -> str:
    """The widest instructions of this processor that the library uses, one of `LEVELS`."""
    return LEVELS[_library().weightcast_delta_level()]


def encode(base: ElementArray, new: ElementArray, max_bytes: int, level: str | None = None) -> Delta | None:
    """The delta from `base` to `new`, contiguous arrays of one dtype and length; None when it exceeds `max_bytes`."""
    assert base.flags.c_contiguous and new.flags.c_contiguous and base.dtype == new.dtype and len(base) == len(new)
    library = _library()
    room = max_bytes - HEADER_BYTES
    if room < 0:
        return None
    arrays = _Room(room, len(new), new.dtype)
    found = arrays.describe(room)
    number = library.weightcast_delta_level() if level is None else LEVELS.index(level)
    if not library.weightcast_delta_encode(
        number, new.itemsize, base.ctypes.data, new.ctypes.data, len(new), ctypes.byref(found)
    ):
        return None
    return arrays.cut(found, len(new))


def apply(delta: Delta, current: ElementArray) -> None:
    """Write the new state of the changed elements of `current`; `delta` has passed `parse_delta`."""
    assert current.flags.c_contiguous and current.flags.writeable
    assert (current.itemsize, len(current)) == (delta.itemsize, delta.num_elements)
    _library().weightcast_delta_apply(
        *(delta.itemsize, current.ctypes.data, delta.gaps.ctypes.data, len(delta.gaps), delta.low.ctypes.data),
        *(delta.values.ctypes.data, delta.ordinals.ctypes.data, len(delta.values)),
    )


class _Room:
    """Memory for the parts of a delta of at most `room` bytes. Pages that are not written cost nothing."""

    def __init__(self, room: int, num_elements: int, dtype: "np.dtype[np.unsignedinteger]") -> None:
        slack = _BLOCK_BYTES + num_elements // SKIP + 1
        self.gaps = np.empty(min(room, num_elements) + slack, np.uint8)
        self.low = np.empty(min(room, num_elements) + _BLOCK_BYTES, np.uint8)
        most = min(room // (dtype.itemsize + 4), num_elements) + _BLOCK_BYTES
        self.values: ElementArray = np.empty(most, dtype)
        self.ordinals: npt.NDArray[np.uint32] = np.empty(most, np.uint32)

    def describe(self, room: int) -> _Found:
        parts = (self.gaps, self.low, self.values, self.ordinals)
        return _Found(*(part.ctypes.data for part in parts), room)

    def cut(self, found: _Found, num_elements: int) -> Delta:
        exceptions = slice(found.num_exceptions)
        gaps: ByteArray = self.gaps[: found.num_gaps]
        low: ByteArray = self.low[: found.num_changes]
        return Delta(self.values.itemsize, num_elements, self.values[exceptions], self.ordinals[exceptions], gaps, low)


def _library() -> ctypes.CDLL:
    library = _load()
    assert library is not None, "the compiled kernel was not built; ask is_available() first"
    return library
