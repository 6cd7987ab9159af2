"""Composable digests: a tensor's digest is the sum of its regions' digests, in any sharding.

Every element of a tensor has a weight that depends on nothing but its coordinates, and the digest is the weighted
sum of the elements' bits, modulo 2**64. So a trainer rank, a file and an engine worker can each vouch for the part
they hold, and the parts add up:

    whole = region_digest(data, spec.whole())
    assert whole == (region_digest(left, left_box) + region_digest(right, right_box)) % 2**64

Along the last dimension elements are read in lanes of 8 bytes; lane weights and the weights of the other
coordinates are odd 64-bit numbers, multiplied together. Any change of a single lane changes the digest; random
changes of many go unseen with a probability near 2**-64. Flips of nothing but lanes' top bits (signs of every 4th
bf16, 2nd fp32 or any fp64) cancel in pairs. It is a checksum against accidents and bugs, not against forgers (the
wire has its own hashes).

`copy_with_digest` copies and digests in one pass over memory. Where `_digest_kernel.c` was compiled and the processor
has AVX-512 or AVX2, that takes no longer than a plain copy; numpy has the same values, more slowly.
"""

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync import digest_kernel
from weightcast.sync.regions import Region

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
LANE_BYTES = 8
# Rows go block by block, so that a table of weights stays at 256 KiB; a block's number has a weight of its own.
BLOCK_LANES = 1 << 15
BLOCK_AXIS = 1 << 8
_MAX_TABLE_BYTES = 1 << 17
MASK = (1 << 64) - 1
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# From here on a copy that is not read again soon leaves the cache alone.
MIN_STREAM_BYTES = 256 << 10
# Steps of splitmix64 (Steele, Lea, Flood 2014), a mixer whose output for 0, 1, 2, ... passes as random.
_GAMMA, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def region_digest(data: torch.Tensor, region: Region, *, level: str | None = None) -> int:
    """The digest of `data`, the contiguous CPU tensor that lies at `region` of its HF tensor; 0 <= digest < 2**64.

    `level` is one of `digest_kernel.available_levels()`, by default the last; all have the same values.
    """
    assert tuple(data.shape) == region.shape and data.device.type == "cpu", (data.shape, region)
    if data.numel() == 0:
        return 0
    level = level if level is not None else digest_kernel.available_levels()[-1]
    if level != digest_kernel.NUMPY and digest_kernel.can_take(data):
        return digest_kernel.digest(block_weights(), data, region, level=level)
    return _digest_by_numpy(data.detach().reshape(-1).view(torch.uint8).numpy(), region, data.element_size())


def bytes_digest(raw: npt.NDArray[np.uint8], region: Region, itemsize: int) -> int:
    """The same of the bytes of a region's elements, in C order, contiguous and writable."""
    offset, shape = region.offset or (0,), region.shape or (1,)
    if raw.nbytes <= _MAX_TABLE_BYTES and not any(offset) and not shape[-1] * itemsize % LANE_BYTES:
        # Thousands of small tensors: one call of numpy costs less than a tensor and a call of the kernel.
        return int(np.einsum("i,i->", raw.view(np.uint64), _table(shape, itemsize))) if len(raw) else 0
    return region_digest(torch.from_numpy(raw).view(_INTEGERS[itemsize]).view(region.shape), region)


def copy_with_digest(
    target: torch.Tensor,
    source: torch.Tensor,
    region: Region,
    *,
    reread: bool = False,
    level: str | None = None,
) -> int:
    """Copy `source` to `target`, tensors of the region's shape, and return the digest of what was copied.

    One pass over memory where both are on the CPU, of one dtype, and contiguous in their last dimension (the others
    may be strided, alignment does not matter); otherwise `copy_` and a second pass. They must not overlap. A large
    copy goes around the cache, unless it is to be read again at once (`reread`), as by a hash of what was packed.
    """
    assert source.shape == target.shape and tuple(target.shape) == region.shape, (source.shape, target.shape, region)
    if target.numel() == 0:
        return 0
    level = level if level is not None else digest_kernel.available_levels()[-1]
    takes_both = digest_kernel.can_take(source) and digest_kernel.can_take(target)
    if level == digest_kernel.NUMPY or source.dtype != target.dtype or not takes_both:
        target.detach().copy_(source)
        return region_digest(target.detach().contiguous().cpu(), region, level=level)
    streams = not reread and target.numel() * target.element_size() >= MIN_STREAM_BYTES
    return digest_kernel.digest(block_weights(), source, region, target, streams=streams, level=level)


def copy_bytes_with_digest(
    target: npt.NDArray[np.uint8],
    source: npt.NDArray[np.uint8],
    region: Region,
    dtype: torch.dtype,
) -> int:
    """As `copy_with_digest`, of the bytes of a region's elements in C order; `target` may be `source` itself."""
    level = digest_kernel.available_levels()[-1]
    is_copied = target.ctypes.data != source.ctypes.data
    if level != digest_kernel.NUMPY:
        streams = is_copied and target.nbytes >= MIN_STREAM_BYTES
        into = target if is_copied else None
        weights = block_weights()
        return digest_kernel.digest_bytes(weights, source, region, dtype.itemsize, into, level=level, streams=streams)
    if is_copied:
        np.copyto(target, source)
    return region_digest(torch.from_numpy(target).view(dtype).view(region.shape), region)


def _digest_by_numpy(raw: npt.NDArray[np.uint8], region: Region, itemsize: int) -> int:
    offset = region.offset or (0,)
    shape = region.shape or (1,)
    lanes, first_lane = _as_lanes(raw.reshape(-1, shape[-1] * itemsize), offset[-1] * itemsize)
    with np.errstate(over="ignore"):
        sums = _sum_lanes(lanes, first_lane)
        for dim in range(len(shape) - 2, -1, -1):
            weights = coordinate_weights(len(shape) - 1 - dim, offset[dim], shape[dim])
            sums = np.einsum("rc,c->r", sums.reshape(-1, shape[dim]), weights)
    return int(sums[0])


@lru_cache(maxsize=64)
def _table(shape: tuple[int, ...], itemsize: int) -> UInt64Array:
    """The weight of every lane of a small tensor: a model of experts has thousands of one shape."""
    num_lanes = shape[-1] * itemsize // LANE_BYTES
    assert num_lanes <= BLOCK_LANES
    with np.errstate(over="ignore"):
        table = coordinate_weights(0, 0, num_lanes) * coordinate_weights(BLOCK_AXIS, 0, 1)[0]
        for dim in range(len(shape) - 2, -1, -1):
            table = np.multiply.outer(coordinate_weights(len(shape) - 1 - dim, 0, shape[dim]), table)
    table = np.ascontiguousarray(table.reshape(-1))
    table.flags.writeable = False
    return table


def add_digests(*digests: int) -> int:
    """The digest of regions put together."""
    return sum(digests) & MASK


def _sum_lanes(lanes: UInt64Array, first_lane: int) -> UInt64Array:
    """Each row's weighted sum; `lanes` begin at lane `first_lane` of the full tensor's rows."""
    sums = np.zeros(lanes.shape[0], np.uint64)
    end_lane = first_lane + lanes.shape[1]
    for block in range(first_lane // BLOCK_LANES, -(-end_lane // BLOCK_LANES)):
        start = max(first_lane, block * BLOCK_LANES)
        stop = min(end_lane, (block + 1) * BLOCK_LANES)
        weights = coordinate_weights(0, start - block * BLOCK_LANES, stop - start)
        part = np.einsum("rc,c->r", lanes[:, start - first_lane : stop - first_lane], weights)
        sums += part * coordinate_weights(BLOCK_AXIS, block, 1)[0]
    return sums


def _as_lanes(rows: npt.NDArray[np.uint8], start_byte: int) -> tuple[UInt64Array, int]:
    """Rows of bytes as rows of 8-byte lanes of the full tensor's rows, and the number of the first lane.

    Where a row does not begin or end on a lane, zeros fill the lane: they add nothing to the sum.
    """
    lead = start_byte % LANE_BYTES
    tail = -(lead + rows.shape[1]) % LANE_BYTES
    if lead or tail:
        padded = np.zeros((rows.shape[0], lead + rows.shape[1] + tail), np.uint8)
        padded[:, lead : lead + rows.shape[1]] = rows
        rows = padded
    return rows.view(np.uint64), start_byte // LANE_BYTES


@lru_cache(maxsize=1)
def block_weights() -> UInt64Array:
    """The weights of a whole block's lanes."""
    return coordinate_weights(0, 0, BLOCK_LANES)


@lru_cache(maxsize=64)
def coordinate_weights(axis: int, start: int, count: int) -> UInt64Array:
    """`count` odd weights for coordinates `start`, `start + 1`, ... of an axis (0 is the last dimension)."""
    with np.errstate(over="ignore"):
        state = np.arange(start, start + count, dtype=np.uint64) + np.uint64((axis + 1) << 48)
        state = (state + np.uint64(1)) * np.uint64(_GAMMA)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_A)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_B)
        mixed: UInt64Array = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    mixed.flags.writeable = False
    return mixed
