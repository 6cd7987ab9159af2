"""What a pass over many pieces is made of: items for a device's programs, and the weights of their rows. Pure.

    plan = plan_passes(shapes)                     # one `PieceShape` a piece
    plan.tiles[WIDE]                               # an item a row; `plan.span(WIDE, first, last)` are those of pieces
    places[number] = address, stride, ...          # where a piece lies just now: `Places`

A piece is rows of lanes of 8 bytes, those of its tensor's last dimension; a digest is the sum over its lanes of lane *
row weight * lane weight * block weight (`digest`). Items say which part of which piece, and where its weights are; they
hold no addresses, so that they are made once for a layout, and lie on the device for as long as it is used.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from weightcast.sync.digest import BLOCK_AXIS, BLOCK_LANES, LANE_BYTES, coordinate_weights
from weightcast.sync.regions import Region

Int64Array: TypeAlias = npt.NDArray[np.int64]

ITEM_FIELDS = 8
"""Piece, its first row, rows, first lane in the piece's rows, lanes, place of the first row's weight, place of the
first lane's weight in a block's, weight of the block."""
PLACE_FIELDS = 4
"""Of a piece: address of its source, lanes from row to row there, the same of its target. Address 0: it is left out."""
# Loads are of 16 bytes.
ALIGNMENT_BYTES = 16
# The largest stride with which a tile's offsets, and an item's, are far from any limit.
MAX_STRIDE_LANES = 1 << 40


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program takes at once, powers of two: rows of lanes, by so many warps.

    An item is of `item_bytes` at most: enough to make its reading of tables nothing, and so little that all of a GPU
    works to the end.
    """

    lanes: int
    rows: int
    warps: int
    item_bytes: int = 256 << 10

    @property
    def item_rows(self) -> int:
        """Of an item, at most."""
        return max(self.rows, self.item_bytes // (self.lanes * LANE_BYTES) // self.rows * self.rows)


WIDE = Tile(lanes=256, rows=8, warps=4)
NARROW = Tile(lanes=32, rows=64, warps=4)
TILES = (WIDE, NARROW)


@dataclass(frozen=True, slots=True)
class PieceShape:
    """A piece's box in its tensor, and the bytes of an element."""

    region: Region
    itemsize: int

    @property
    def num_rows(self) -> int:
        """Rows of the last dimension."""
        return math.prod(self.region.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Of each row."""
        return (self.region.shape[-1] if self.region.shape else 1) * self.itemsize

    @property
    def start_byte(self) -> int:
        """Where the piece's rows begin in those of its tensor."""
        return (self.region.offset[-1] if self.region.offset else 0) * self.itemsize

    @property
    def is_taken(self) -> bool:
        """Whether a kernel may take it, as far as its shape says."""
        return self.num_rows > 0 and self.row_bytes > 0 and not (self.row_bytes | self.start_byte) % ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class PassPlan:
    """Items by tile, in the order of pieces: [items, ITEM_FIELDS]; and the weights that they point to."""

    tiles: Mapping[Tile, Int64Array]
    row_weights: Int64Array

    def span(self, tile: Tile, first: int, last: int) -> tuple[int, int]:
        """The items of pieces `first` to `last`, which is not among them."""
        begin, end = np.searchsorted(self.tiles[tile][:, 0], (first, last))
        return int(begin), int(end)


def plan_passes(shapes: Sequence[PieceShape], tiles: Sequence[Tile] = TILES) -> PassPlan:
    """Items for all pieces that a kernel may take; `tiles` are the widest first."""
    found: dict[Tile, list[Int64Array]] = {tile: [] for tile in tiles}
    weights: list[Int64Array] = []
    starts: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    num_weights = 0
    for number, shape in enumerate(shapes):
        if not shape.is_taken:
            continue
        key = (shape.region.offset[:-1], shape.region.shape[:-1])
        if key not in starts:
            starts[key] = num_weights
            weights.append(_row_weights(*key))
            num_weights += len(weights[-1])
        tile = _choose_tile(shape.row_bytes // LANE_BYTES, tiles)
        items = _list_items(shape.num_rows, shape.row_bytes, shape.start_byte, tile).copy()
        items[:, 0] = number
        items[:, 5] += starts[key]
        found[tile].append(items)
    empty = np.zeros((0, ITEM_FIELDS), np.int64)
    return PassPlan(
        {tile: np.concatenate([empty, *items]) for tile, items in found.items()},
        np.concatenate([np.zeros(0, np.int64), *weights]),
    )


def _choose_tile(num_lanes: int, tiles: Sequence[Tile]) -> Tile:
    """The one of which the least is empty; the first of those that are alike."""
    return min(tiles, key=lambda tile: -(-num_lanes // tile.lanes) * tile.lanes)


@lru_cache(maxsize=1 << 12)
def _list_items(num_rows: int, row_bytes: int, start_byte: int, tile: Tile) -> Int64Array:
    """Row by row of tiles, so that programs beside each other read what lies beside each other."""
    columns = np.array(list(_cut_columns(row_bytes, start_byte, tile.lanes)), np.int64)
    first_rows = np.arange(0, num_rows, tile.item_rows, dtype=np.int64)
    items = np.zeros((len(first_rows), len(columns), ITEM_FIELDS), np.int64)
    items[:, :, 1] = first_rows[:, None]
    items[:, :, 2] = np.minimum(tile.item_rows, num_rows - first_rows)[:, None]
    items[:, :, 5] = first_rows[:, None]
    items[:, :, (3, 4, 6, 7)] = columns[None]
    return items.reshape(-1, ITEM_FIELDS)


def _cut_columns(row_bytes: int, start_byte: int, max_lanes: int) -> Iterator[tuple[int, int, int, int]]:
    """(first lane of the piece's row, lanes, first lane within its block, the block's weight); none crosses a block."""
    first, end = start_byte // LANE_BYTES, (start_byte + row_bytes) // LANE_BYTES
    lane = first
    while lane < end:
        block, inside = divmod(lane, BLOCK_LANES)
        count = min(max_lanes, end - lane, BLOCK_LANES - inside)
        weight = int(coordinate_weights(BLOCK_AXIS, block, 1).view(np.int64)[0])
        yield lane - first, count, inside, weight
        lane += count


def _row_weights(offset: tuple[int, ...], shape: tuple[int, ...]) -> Int64Array:
    """The product of the weights of all dimensions but the last, for each row of a box, in C order."""
    weights = np.ones(1, np.uint64)
    with np.errstate(over="ignore"):
        for dim, (start, count) in enumerate(zip(offset, shape, strict=True)):
            along = coordinate_weights(len(shape) - dim, start, count)
            weights = np.multiply.outer(weights, along).reshape(-1)
    return weights.view(np.int64)


def check_places(places: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether a kernel may take each piece where it lies: [pieces, PLACE_FIELDS]; none with a source of 0."""
    is_taken: npt.NDArray[np.bool_] = places[:, 0] != 0
    is_taken &= ((places[:, 0] | places[:, 2]) % ALIGNMENT_BYTES == 0) & ((places[:, 1] | places[:, 3]) % 2 == 0)
    strides = places[:, (1, 3)]
    is_taken &= ((strides >= 0) & (strides < MAX_STRIDE_LANES)).all(1)
    return is_taken


def find_stride(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int | None:
    """Lanes from row to row of a tensor, all its rows in one; None where there is no such number.

    `strides` are in elements. 0 where there is one row.
    """
    num_bytes = find_step(shape, strides, itemsize)
    return None if num_bytes is None or num_bytes % LANE_BYTES else num_bytes // LANE_BYTES


def find_step(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int | None:
    """As `find_stride`, in bytes."""
    if not shape:
        return 0
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    step, rows = 0, 1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if rows > 1 and stride != step * rows:
            return None
        step = step if rows > 1 else stride
        rows *= size
    return step * itemsize
