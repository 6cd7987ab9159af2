"""Digests on a tensor's own device, in torch operations alone: the same numbers as `digest` has.

What a trainer packs on a GPU, and what an engine lands on one, is digested where it lies. Nothing waits for the
device: sums stay there, as signed 64-bit integers, which wrap around as a digest does, until they are all read.

    sums = region_sum(live, region)            # a number on live's device
    digest = as_digest(sums)                   # waits for the device; 0 <= digest < 2**64
"""

from functools import lru_cache

import torch

from weightcast.sync.digest import BLOCK_AXIS, BLOCK_LANES, LANE_BYTES, MASK, coordinate_weights
from weightcast.sync.regions import Region


def region_sum(data: torch.Tensor, region: Region) -> torch.Tensor:
    """The digest of `data`, which lies at `region` of its HF tensor, as int64 of no dimensions on its device.

    It may have any strides. Takes as much memory again as `data`.
    """
    assert tuple(data.shape) == region.shape, (data.shape, region)
    if data.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=data.device)
    offset, shape = region.offset or (0,), region.shape or (1,)
    rows = data.detach().contiguous().reshape(-1, shape[-1]).view(torch.uint8)
    lanes, first_lane = _as_lanes(rows, offset[-1] * data.element_size())
    sums = _sum_lanes(lanes, first_lane)
    for dim in range(len(shape) - 2, -1, -1):
        weights = _weights_on(data.device, len(shape) - 1 - dim, offset[dim], shape[dim])
        sums = (sums.reshape(-1, shape[dim]) * weights).sum(1)
    return sums[0]


def as_digest(total: torch.Tensor) -> int:
    """What `region_sum` or a sum of those comes to. Waits for the device."""
    return int(total) & MASK


def as_digests(totals: list[torch.Tensor]) -> list[int]:
    """Of many, in one wait."""
    return [int(total) & MASK for total in torch.stack(totals).tolist()] if totals else []


def _as_lanes(rows: torch.Tensor, start_byte: int) -> tuple[torch.Tensor, int]:
    """Rows of bytes as lanes of the full tensor's rows; zeros fill those at the edges, as in `digest`."""
    lead = start_byte % LANE_BYTES
    tail = -(lead + rows.shape[1]) % LANE_BYTES
    if lead or tail:
        rows = torch.nn.functional.pad(rows, (lead, tail))
    elif rows.storage_offset() % LANE_BYTES:
        rows = rows.clone()
    return rows.view(torch.int64), start_byte // LANE_BYTES


def _sum_lanes(lanes: torch.Tensor, first_lane: int) -> torch.Tensor:
    """Each row's weighted sum; `lanes` begin at lane `first_lane` of the full tensor's rows."""
    end_lane = first_lane + lanes.shape[1]
    blocks = range(first_lane // BLOCK_LANES, -(-end_lane // BLOCK_LANES))
    table = _weights_on(lanes.device, 0, 0, BLOCK_LANES)
    of_blocks = coordinate_weights(BLOCK_AXIS, blocks.start, len(blocks)).view("i8").tolist()
    parts = []
    for block, weight in zip(blocks, of_blocks, strict=True):
        start, stop = max(first_lane, block * BLOCK_LANES), min(end_lane, (block + 1) * BLOCK_LANES)
        weights = table[start - block * BLOCK_LANES : stop - block * BLOCK_LANES]
        parts.append((lanes[:, start - first_lane : stop - first_lane] * weights).sum(1) * weight)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


@lru_cache(maxsize=64)
def _weights_on(device: torch.device, axis: int, start: int, count: int) -> torch.Tensor:
    return torch.tensor(coordinate_weights(axis, start, count).view("i8"), device=device)
