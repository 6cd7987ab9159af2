"""The Triton kernel of `device_passes`: pieces are copied and digested in one pass over a device's memory.

Imported inside the function that needs it, where Triton is installed. A program takes one item of `pass_plan`: so many
rows of so many lanes of one piece. Of each lane (8 bytes) it adds up the products with the rows' weights, which costs
one multiplication a lane; the sums are multiplied with the lanes' weights once an item. All wraps around modulo 2**64,
as a digest does, so that neither the order of programs nor that of the additions matters.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from weightcast.sync.pass_plan import ITEM_FIELDS, PLACE_FIELDS, Tile


@triton.jit  # type: ignore[untyped-decorator]
def _run_items(
    items: tl.tensor,
    places: tl.tensor,
    row_weights: tl.tensor,
    lane_weights: tl.tensor,
    sums: tl.tensor,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    ITEM: tl.constexpr,
    PLACE: tl.constexpr,
) -> None:
    item = items + tl.program_id(0) * ITEM
    piece = tl.load(item)
    place = places + piece * PLACE
    source = tl.load(place)
    if source != 0:  # what the kernel cannot take is left out
        first_row = tl.load(item + 1)
        num_rows = tl.load(item + 2).to(tl.int32)
        first_lane = tl.load(item + 3)
        num_lanes = tl.multiple_of(tl.load(item + 4).to(tl.int32), 2)
        stride = tl.multiple_of(tl.load(place + 1), 2)
        source = source + (first_row * stride + first_lane) * 8
        source_ptr = tl.multiple_of(tl.multiple_of(source, 16).to(tl.pointer_type(tl.int64)), 16)
        rows, lanes = tl.arange(0, ROWS), tl.arange(0, LANES)
        has_lane = lanes < num_lanes
        inside = rows.to(tl.int64)[:, None] * stride + lanes[None, :]
        if COPIES:
            target_stride = tl.multiple_of(tl.load(place + 3), 2)
            target = tl.load(place + 2) + (first_row * target_stride + first_lane) * 8
            target_ptr = tl.multiple_of(tl.multiple_of(target, 16).to(tl.pointer_type(tl.int64)), 16)
            target_inside = rows.to(tl.int64)[:, None] * target_stride + lanes[None, :]
        weights_ptr = row_weights + tl.load(item + 5)
        total = tl.zeros([ROWS, LANES], dtype=tl.int64)
        for start in range(0, num_rows, ROWS):
            has_row = start + rows < num_rows
            mask = has_row[:, None] & has_lane[None, :]
            data = tl.load(source_ptr + inside, mask=mask, other=0)
            source_ptr += ROWS * stride
            if COPIES:
                tl.store(target_ptr + target_inside, data, mask=mask)
                target_ptr += ROWS * target_stride
            weights = tl.load(weights_ptr + start + rows, mask=has_row, other=0)
            total += data * weights[:, None]
        of_lanes = tl.load(lane_weights + tl.load(item + 6) + lanes, mask=has_lane, other=0)
        digest = tl.sum(tl.sum(total, 0) * of_lanes, 0) * tl.load(item + 7)
        tl.atomic_add(sums + piece, digest)


def run_items(
    tile: Tile,
    items: torch.Tensor,
    places: torch.Tensor,
    row_weights: torch.Tensor,
    lane_weights: torch.Tensor,
    sums: torch.Tensor,
    *,
    copies: bool,
) -> None:
    """Launch a program for each of `items` on their device's current stream; see `device_passes.Runner`."""
    constants = {"COPIES": copies, "ROWS": tile.rows, "LANES": tile.lanes, "ITEM": ITEM_FIELDS, "PLACE": PLACE_FIELDS}
    device = items.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _run_items[(len(items),)](items, places, row_weights, lane_weights, sums, **constants, num_warps=tile.warps)
