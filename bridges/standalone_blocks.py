"""Tensors in blocks of bounded bytes, and digests that add up over them.

for region in split_region(spec):
    add_digest(digests, spec.name, region_digest(read(region), region))
"""

from collections.abc import Callable, Iterator

import torch

from weightcast.sync.digest import add_digests, region_digest
from weightcast.sync.regions import Region, TensorSpec

CHUNK_BYTES = 16 * 2**20


def split_box(
    shape: tuple[int, ...], itemsize: int, max_bytes: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and shapes of blocks of at most `max_bytes`, cut along the first dimensions; a single row may exceed it.

    In row-major order; together they tile the box.
    """
    axis = next((axis for axis, size in enumerate(shape) if size > 1), None)
    total = itemsize
    for size in shape:
        total *= size
    if axis is None or total <= max_bytes:
        yield (0,) * len(shape), shape
        return
    row_bytes = total // shape[axis]
    step = max(1, max_bytes // row_bytes)
    for start in range(0, shape[axis], step):
        offset = (*(0,) * axis, start, *(0,) * (len(shape) - axis - 1))
        size = min(step, shape[axis] - start)
        yield offset, (*shape[:axis], size, *shape[axis + 1 :])


def split_region(spec: TensorSpec, max_bytes: int = CHUNK_BYTES) -> Iterator[Region]:
    """A whole tensor in regions of at most `max_bytes`."""
    for offset, shape in split_box(spec.shape, spec.dtype.itemsize, max_bytes):
        yield Region(spec.name, offset, shape)


def add_digest(digests: dict[str, int], name: str, digest: int) -> None:
    """Add a region's digest to its tensor's."""
    digests[name] = add_digests(digests.get(name, 0), digest)


def read_digest(spec: TensorSpec, read: Callable[[Region], torch.Tensor]) -> int:
    """The digest of a whole tensor that `read` gives block by block."""
    return add_digests(*(region_digest(read(region).contiguous(), region) for region in split_region(spec)))
