"""The compiled loops of `digest`, where a C compiler was there at install; `digest` does without.

One pass over memory sums a region's weighted lanes and, where there is a target, copies it as well.
"""

import ctypes
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.compiled import LEVELS, load_library
from weightcast.sync.regions import Region

# What does the work where nothing was compiled.
NUMPY = "numpy"
# As in the C file, which keeps the coordinates of a row on its stack.
MAX_DIMENSIONS = 64


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    library = load_library("_digest_kernel")
    if library is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.weightcast_digest_level.argtypes = []
    library.weightcast_digest.argtypes = [
        *(ctypes.c_int, pointer, size, size, pointer, pointer),
        *(pointer, pointer, pointer, pointer, ctypes.c_int),
    ]
    library.weightcast_digest.restype = ctypes.c_uint64
    library.weightcast_digest_boxes.argtypes = [ctypes.c_int, pointer, size, pointer, pointer]
    library.weightcast_digest_boxes.restype = None
    return library


@lru_cache(maxsize=1)
def available_levels() -> tuple[str, ...]:
    """What can compute digests here, the fastest last: `NUMPY` and, where the library was built, of `LEVELS`."""
    library = _load()
    return (NUMPY,) if library is None else (NUMPY, *LEVELS[: library.weightcast_digest_level() + 1])


def can_take(tensor: torch.Tensor) -> bool:
    """Whether the loops can walk over this tensor: on a CPU and contiguous in its last dimension."""
    is_row = not tensor.dim() or tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and is_row and tensor.dim() <= MAX_DIMENSIONS


def digest(
    table: npt.NDArray[np.uint64],
    source: torch.Tensor,
    region: Region,
    target: torch.Tensor | None = None,
    *,
    level: str,
    streams: bool = False,
) -> int:
    """The digest of `source`, which lies at `region`, copied to `target` in the same pass where one is given.

    Both are not empty, of one dtype and of the region's shape, and pass `can_take`; `table` holds the weights of a
    block of lanes, `level` is one of `available_levels` but `NUMPY`. `streams` stores around the cache: for large
    targets that are not read soon.
    """
    assert source.numel() and can_take(source) and tuple(source.shape) == region.shape, (source.shape, region)
    assert target is None or (can_take(target) and target.shape == source.shape and target.dtype == source.dtype), (
        source.shape,
        source.dtype,
    )
    library = _load()
    assert library is not None and level in available_levels(), level
    num_dims = max(1, source.dim())
    numbers = ctypes.c_ssize_t * num_dims
    itemsize = source.element_size()
    found: int = library.weightcast_digest(
        *(LEVELS.index(level), table.ctypes.data, itemsize, num_dims),
        *(numbers(*(region.shape or (1,))), numbers(*(region.offset or (0,)))),
        *(source.data_ptr(), numbers(*(step * itemsize for step in source.stride()))),
        target.data_ptr() if target is not None else None,
        numbers(*(step * itemsize for step in target.stride())) if target is not None else None,
        streams,
    )
    return found


def digest_bytes(
    table: npt.NDArray[np.uint64],
    source: npt.NDArray[np.uint8],
    region: Region,
    itemsize: int,
    target: npt.NDArray[np.uint8] | None = None,
    *,
    level: str,
    streams: bool = False,
) -> int:
    """The same of the bytes of a region's elements, in C order: chunks have thousands of pieces, tensors cost time."""
    num_bytes = region.numel * itemsize
    assert source.nbytes == num_bytes > 0 and (target is None or target.nbytes == num_bytes), (source.nbytes, region)
    library = _load()
    assert library is not None and level in available_levels(), level
    num_dims, shape, offset, strides = _describe_box(region.shape, region.offset, itemsize)
    found: int = library.weightcast_digest(
        *(LEVELS.index(level), table.ctypes.data, itemsize, num_dims, shape, offset),
        *(source.ctypes.data, strides),
        *((None, None) if target is None else (target.ctypes.data, strides)),
        streams,
    )
    return found


def digest_boxes(table: npt.NDArray[np.uint64], boxes: npt.NDArray[np.int64], *, level: str) -> npt.NDArray[np.uint64]:
    """The same of many boxes, none of them empty: rows of `host_passes.BOX_FIELDS`, which point to what lives on."""
    library = _load()
    assert library is not None and level in available_levels() and level != NUMPY, level
    assert boxes.flags.c_contiguous and boxes.ndim == 2, boxes.shape
    found = np.zeros(len(boxes), np.uint64)
    library.weightcast_digest_boxes(
        LEVELS.index(level), table.ctypes.data, len(boxes), boxes.ctypes.data, found.ctypes.data
    )
    return found


@lru_cache(maxsize=1 << 14)
def _describe_box(
    shape: tuple[int, ...], offset: tuple[int, ...], itemsize: int
) -> tuple[int, "ctypes.Array[ctypes.c_ssize_t]", "ctypes.Array[ctypes.c_ssize_t]", "ctypes.Array[ctypes.c_ssize_t]"]:
    """A box in C order as the loops take it: every version has the same boxes."""
    num_dims = max(1, len(shape))
    numbers = ctypes.c_ssize_t * num_dims
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return num_dims, numbers(*(shape or (1,))), numbers(*(offset or (0,))), numbers(*strides)
