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
