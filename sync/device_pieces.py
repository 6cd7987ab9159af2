"""Pieces of chunks on a source's device: whose they are, where they lie, and what their digests add up to. Pure.

owners_of = find_owners(chunks, regions)                # of each chunk, by piece, its region's number
address, lanes = place_within(piece.region, region, live, dtype, device)
share_out(run.digests(), states, owners_of, totals)     # the digests of a pass, to chunks and regions
"""

from collections.abc import Sequence

import torch

from weightcast.sync.chunks import Chunk
from weightcast.sync.digest import LANE_BYTES
from weightcast.sync.pass_plan import find_step
from weightcast.sync.regions import Region
from weightcast.sync.snapshot import ChunkState


def share_out(
    found: list[int], states: Sequence[ChunkState], owners_of: Sequence[tuple[int, ...]], totals: list[int]
) -> None:
    """Note the digests of pieces, in order, at their chunks, and add each to that of the region around it."""
    start = 0
    for state, owners in zip(states, owners_of, strict=True):
        state.digests = digests = found[start : start + len(owners)]
        start += len(owners)
        for number, digest in zip(owners, digests, strict=True):
            totals[number] += digest


def find_owners(chunks: Sequence[Chunk], regions: Sequence[Region]) -> list[tuple[int, ...]]:
    """Of each chunk, by piece, the number of the region around it: pieces come in the order of regions."""
    found: list[tuple[int, ...]] = []
    number, left = -1, 0
    for chunk in chunks:
        owners = []
        for piece in chunk.pieces:
            while not left:
                number += 1
                left = regions[number].numel
            left -= piece.region.numel
            owners.append(number)
        found.append(tuple(owners))
    return found


def place_within(
    piece: Region, region: Region, live: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """As `place_of`, of a piece within the live view of its region; zeros where a kernel cannot read it there."""
    address, step = step_within(piece, region, live, dtype, device)
    return (0, 0) if step % LANE_BYTES else (address, step // LANE_BYTES)


def step_within(
    piece: Region, region: Region, live: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """(address, bytes from row to row) of a piece within the live view of its region.

    Zeros where it is cast, lies on another device, or in rows at no equal distances.
    """
    if live.dtype != dtype or live.device != device:
        return 0, 0
    strides = live.stride()
    step = find_step(piece.shape, strides, dtype.itemsize)
    if step is None:
        return 0, 0
    start = sum((at - base) * step for at, base, step in zip(piece.offset, region.offset, strides, strict=True))
    return live.data_ptr() + start * dtype.itemsize, step


def lies_at(live: torch.Tensor | None) -> tuple[object, ...]:
    """Where a tensor lies; two that lie alike may be read by one table."""
    return () if live is None else (live.data_ptr(), live.stride(), live.dtype, live.device)
