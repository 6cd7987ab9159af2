"""What stands in for the kernel where there is no GPU: the same tables, read by numpy out of this process's memory."""

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.pass_plan import Tile

UInt64Array = npt.NDArray[np.uint64]


def run_by_numpy(
    tile: Tile,
    items: torch.Tensor,
    places: torch.Tensor,
    row_weights: torch.Tensor,
    lane_weights: torch.Tensor,
    sums: torch.Tensor,
    *,
    copies: bool,
) -> None:
    """See `device_passes.Runner`."""
    rows, lanes = row_weights.numpy().view(np.uint64), lane_weights.numpy().view(np.uint64)
    totals = sums.numpy().view(np.uint64)
    for piece, first_row, num_rows, first_lane, num_lanes, row, lane, block in items.tolist():
        source, stride, target, target_stride = places[piece].tolist()
        if not source:
            continue
        assert num_lanes <= tile.lanes and not (source | target) % 16 and not (num_lanes | stride | target_stride) % 2
        data = np.stack([_lanes(source + (r * stride + first_lane) * 8, num_lanes) for r in _rows(first_row, num_rows)])
        if copies:
            for number, r in enumerate(_rows(first_row, num_rows)):
                _lanes(target + (r * target_stride + first_lane) * 8, num_lanes)[:] = data[number]
        with np.errstate(over="ignore"):
            of_lanes = (data * rows[row : row + num_rows, None]).sum(0, dtype=np.uint64)
            total = (of_lanes * lanes[lane : lane + num_lanes]).sum(dtype=np.uint64)
            totals[piece] += total * np.uint64(block % 2**64)


def _rows(first: int, count: int) -> range:
    return range(first, first + count)


def _lanes(address: int, count: int) -> UInt64Array:
    found: UInt64Array = np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address))
    return found
