"""Many pieces copied and digested in one pass over a device's memory: two launches and one wait for a run of chunks.

    passes = ChunkPasses(chunks, dtypes, device)               # tables, made once for a layout
    run = passes.launch(first, count, places, find_source, find_target)
    run.digests()                                              # of each piece, in order; waits for the device

`places` say where each piece lies just now (`pass_plan`); bits and digests are those of `copy_` and `region_sum`.
Pieces that the kernel cannot take (rows that are no multiples of 16 bytes, strides within a row, another dtype than was
announced) go that way one by one, and so does everything where there is no Triton, no compiler for it, or no CUDA.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.chunks import Chunk
from weightcast.sync.digest import BLOCK_LANES, LANE_BYTES, MASK, coordinate_weights
from weightcast.sync.digest_torch import region_sum
from weightcast.sync.pass_plan import (
    NARROW,
    PLACE_FIELDS,
    TILES,
    WIDE,
    Int64Array,
    PassPlan,
    PieceShape,
    Tile,
    check_places,
    find_stride,
    plan_passes,
)
from weightcast.sync.regions import Region

logger = logging.getLogger(__name__)

FindPiece: TypeAlias = Callable[[int], torch.Tensor]
"""The tensor of a run's piece, by its number within the run."""


class Runner(Protocol):
    """What runs items on a device: the kernel, or what stands in for it in tests."""

    def __call__(
        self,
        tile: Tile,
        items: torch.Tensor,
        places: torch.Tensor,
        row_weights: torch.Tensor,
        lane_weights: torch.Tensor,
        sums: torch.Tensor,
        *,
        copies: bool,
    ) -> None:
        """Add the digest of each item to `sums`, by its piece; with `copies` bring its bytes to the piece's target."""
        ...


@dataclass(slots=True)
class RunningPass:
    """A pass that was launched; it keeps alive what it reads. Passes may be launched before others have ended."""

    taken: int
    """How many pieces the kernel took."""
    _sums: torch.Tensor
    _held: Sequence[object]
    _end: torch.cuda.Event | None
    is_done = False

    def wait(self) -> None:
        """Until the device is done with it."""
        if self._end is not None:
            self._end.synchronize()
            self._end = None
        self._held = ()

    def digests(self) -> list[int]:
        """Of each piece; when this returns, the device is done with them."""
        self.wait()
        return [total & MASK for total in self._sums.tolist()]


@dataclass(frozen=True, slots=True)
class _Tables:
    """A plan on the device; `is_taken` and what follows it have a row a piece of the layout."""

    plan: PassPlan
    items: Mapping[Tile, torch.Tensor]
    row_weights: torch.Tensor
    lane_weights: torch.Tensor
    is_taken: npt.NDArray[np.bool_]
    host_places: torch.Tensor
    places: torch.Tensor
    sums: torch.Tensor


class ChunkPasses:
    """See the module. `runner` and `tiles` are for tests; by default the kernel is taken where there is one."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        runner: Runner | None = None,
        tiles: Sequence[Tile] = TILES,
    ) -> None:
        self.device = device
        self._tiles = tiles
        self.shapes = [
            PieceShape(piece.region, dtypes[piece.region.name].itemsize) for chunk in chunks for piece in chunk.pieces
        ]
        self.row_lanes = [shape.row_bytes // LANE_BYTES for shape in self.shapes]
        """Of each piece, in the bytes of its chunk."""
        self.first_pieces = tuple(accumulate((len(chunk.pieces) for chunk in chunks), initial=0))
        """Of each chunk, and the number of all at the end."""
        self.runner = find_runner(device) if runner is None else runner
        self._tables: _Tables | None = None
        self._host_sums: torch.Tensor | None = None

    def span(self, first: int, count: int) -> slice:
        """The pieces of a run of chunks."""
        return slice(self.first_pieces[first], self.first_pieces[first + count])

    def launch(
        self,
        first: int,
        count: int,
        places: Int64Array,
        find_source: FindPiece,
        find_target: FindPiece | None,
        held: Sequence[object] = (),
    ) -> RunningPass:
        """Begin to copy and digest the pieces of `count` chunks from `first` on; without `find_target` to digest only.

        `places` has a row for each of them; a source of 0 says that only torch knows how to read it.
        """
        span = self.span(first, count)
        shapes = self.shapes[span]
        is_taken = np.zeros(len(shapes), np.bool_)
        if self.runner is not None:
            tables = self._tables = self._tables or self._make_tables()
            is_taken = tables.is_taken[span] & check_places(places)
        if self.runner is not None and is_taken.any():
            sums = self._launch_items(
                self.runner, span, np.where(is_taken[:, None], places, 0), find_target is not None
            )
        else:
            sums = torch.zeros(len(shapes), dtype=torch.int64, device=self.device)
        left = np.flatnonzero(~is_taken).tolist()
        if left:
            totals = [_pass_by_torch(shapes[n].region, find_source(n), find_target and find_target(n)) for n in left]
            sums[torch.tensor(left, device=self.device)] = torch.stack(totals)
        return self._read_back(span, sums, len(shapes) - len(left), held)

    def _read_back(self, span: slice, sums: torch.Tensor, taken: int, held: Sequence[object]) -> RunningPass:
        """Send the sums home after the pass: to ask for them once it has ended would be to wait for later ones."""
        if self.device.type != "cuda":
            return RunningPass(taken, sums.clone(), held, None)
        if self._host_sums is None:
            self._host_sums = self._allocate_here(len(self.shapes))
        here = self._host_sums[span].copy_(sums, non_blocking=True)
        return RunningPass(taken, here, held, torch.cuda.current_stream(self.device).record_event())

    def _launch_items(self, runner: Runner, span: slice, places: Int64Array, copies: bool) -> torch.Tensor:
        tables = self._tables
        assert tables is not None
        # Locked pages: a copy out of others would wait for the passes before.
        tables.host_places[span].copy_(torch.from_numpy(places))
        tables.places[span].copy_(tables.host_places[span], non_blocking=True)
        tables.sums[span].zero_()
        for tile, items in tables.items.items():
            begin, end = tables.plan.span(tile, span.start, span.stop)
            if begin < end:
                weights = tables.row_weights, tables.lane_weights
                runner(tile, items[begin:end], tables.places, *weights, tables.sums, copies=copies)
        return tables.sums[span]

    def _allocate_here(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def _make_tables(self) -> _Tables:
        plan = plan_passes(self.shapes, self._tiles)

        def put(table: npt.NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(table).to(self.device)

        count = len(self.shapes)
        return _Tables(
            plan,
            {tile: put(items) for tile, items in plan.tiles.items()},
            put(plan.row_weights),
            put(coordinate_weights(0, 0, BLOCK_LANES).view(np.int64).copy()),
            np.array([shape.is_taken for shape in self.shapes], np.bool_),
            self._allocate_here(count, PLACE_FIELDS),
            torch.zeros((count, PLACE_FIELDS), dtype=torch.int64, device=self.device),
            torch.zeros(count, dtype=torch.int64, device=self.device),
        )


def _pass_by_torch(region: Region, source: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    if target is None:
        return region_sum(source, region)
    target.copy_(source)
    return region_sum(target, region)


def place_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, lanes from row to row) for `places`; zeros where only torch can read it."""
    stride = find_stride(tensor.shape, tensor.stride(), tensor.element_size())
    return (0, 0) if stride is None else (tensor.data_ptr(), stride)


@lru_cache(maxsize=64)
def find_runner(device: torch.device) -> Runner | None:
    """The kernel on `device`, compiled, and tried against torch; None where it cannot be had."""
    if device.type != "cuda":
        return None
    try:
        from weightcast.sync.pass_kernel import run_items

        if is_right(run_items, device):
            return run_items
        logger.warning("digests on %s are taken by torch: the kernel's are others", device)
    except Exception as error:  # whatever Triton, or the compiler that it needs, lacks: there is another way
        logger.warning("digests on %s are taken by torch, the kernel cannot be had: %s", device, error)
    return None


def is_right(runner: Runner, device: torch.device) -> bool:
    """Whether a runner copies and digests as torch does: a piece of each tile, with a copy and without."""
    for tile in (WIDE, NARROW):
        region = Region("trial", (3, 2 * tile.lanes), (tile.rows + 1, tile.lanes))
        data = torch.arange(region.numel, device=device).mul_(0x9E3779B97F4A7C15 - (1 << 64)).view(region.shape)
        passes = ChunkPasses((), {}, device, runner)
        passes.shapes, passes.first_pieces = [PieceShape(region, 8)], (0, 1)
        wanted = int(region_sum(data, region)) & MASK
        for target in (torch.zeros_like(data), None):
            row = [*place_of(data), *((0, 0) if target is None else place_of(target))]
            run = passes.launch(0, 1, np.array([row], np.int64), data.__getitem__, None if target is None else _fail)
            if run.digests() != [wanted] or run.taken != 1 or not (target is None or torch.equal(target, data)):
                return False
    return True


def _fail(number: int) -> torch.Tensor:
    raise AssertionError(f"the kernel was to take piece {number}")
