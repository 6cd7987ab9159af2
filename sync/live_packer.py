"""The packer that packs nothing: engines read a source's weights where they lie on its GPU, and it digests them there.

    packer = LivePacker(held, specs, regions, chunks, arena)
    packer.look()                           # where the weights lie just now; ReachError when engines cannot read there
    packer.tickets                          # for the announcement
    snapshot = packer.begin(version, "off") # chunks are ready at once; the rest as with `Packer`

It reads every byte once and writes none, and keeps no copy on the device. The price: the weights must stay as they are
until every engine has staged the version. If they do not, the digests, which are those of the weights as they were,
refuse what an engine read.

What cannot be read in place (`cuda_ipc_live`) is copied into memory of its own first, piece by piece. Chunks that
somebody wants to be sent are copied to the host when they are asked for.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_packer import MAX_MADE_BYTES
from weightcast.sync.device_passes import ChunkPasses, RunningPass
from weightcast.sync.device_pieces import lies_at, share_out, step_within
from weightcast.sync.digest import add_digests
from weightcast.sync.in_place_packer import InPlacePacker
from weightcast.sync.packer import PackMode
from weightcast.sync.pass_plan import PLACE_FIELDS, Int64Array
from weightcast.sync.piece_views import slices_within, view_piece
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports.cuda_ipc_live import ExposedLive, expose_live, find_device
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Run:
    count: int
    running: RunningPass


class LivePacker(InPlacePacker[ExposedLive]):
    """See the module. Raises `ReachError` without a GPU."""

    def __init__(
        self,
        held: Mapping[Region, HeldRegion],
        specs: Mapping[str, TensorSpec],
        regions: Sequence[Region],
        chunks: Sequence[Chunk],
        arena: ByteArray,
    ) -> None:
        super().__init__(held, specs, regions, chunks, arena)
        self._device = find_device()
        self._passes = ChunkPasses(chunks, self._dtypes, self._device)
        self._pieces = [
            (piece, owner)
            for chunk, owners in zip(chunks, self._owners_of, strict=True)
            for piece, owner in zip(chunk.pieces, owners, strict=True)
        ]
        # Those that may lie in one place from version to version: they are looked at each time.
        self._fixed = [
            (number, region, held[region].live)
            for number, region in enumerate(regions)
            if region.numel and not held[region].is_made
        ]
        self._lives: list[torch.Tensor | None] = []
        self._seen: list[tuple[object, ...]] = []
        self._places: Int64Array = np.zeros((0, PLACE_FIELDS), np.int64)
        self._copied_bytes: list[int] = []
        self._totals = [0] * len(regions)
        self._ahead: _Run | None = None

    # Where the weights lie

    def look(self) -> None:
        """See `InPlacePacker`."""
        lives: list[torch.Tensor | None] = [None] * len(self._regions)
        for number, region, find in self._fixed:
            lives[number] = self._check_shape(region, find())
        if self._exposed is None or [lies_at(live) for live in lives] != self._seen:
            self._expose([None if live is None else live.detach() for live in lives])
            self._seen = [lies_at(live) for live in self._lives]

    def _expose(self, lives: list[torch.Tensor | None]) -> None:
        for number, _, find in list(self._fixed):
            live = lives[number]
            # A tensor that was made just now lies elsewhere when it is made again.
            if live is not None and find().data_ptr() != live.data_ptr():
                lives[number] = None
        self._fixed = [fixed for fixed in self._fixed if lives[fixed[0]] is not None]
        before, self._exposed = self._exposed, None
        if before is not None:
            before.close()
        self._lives = lives
        self._exposed = expose_live(self._list_pieces(), self.num_bytes, [live for live in lives if live is not None])
        self._places = np.zeros((len(self._pieces), PLACE_FIELDS), np.int64)
        self._places[:, :2] = self._exposed.places
        is_packed = (self._exposed.packed_starts >= 0).tolist()
        self._copied_bytes = [
            sum(self._pieces[n][0].num_bytes for n in self._numbers(index) if is_packed[n])
            for index in range(len(self._states))
        ]
        for state, num_bytes in zip(self._live_states, self._copied_bytes, strict=True):
            state.is_live = not num_bytes
        if any(is_packed):
            why = next(iter(self._exposed.refusals), "they are made or cast for each version, or have no even rows")
            logger.info(
                "engines read the weights where they lie, but for %d of %d bytes, which are packed: %s",
                *(sum(self._copied_bytes), self.num_bytes, why),
            )

    def _list_pieces(self) -> Int64Array:
        """See `cuda_ipc_live.PIECE_FIELDS`."""
        rows = []
        start = number = 0
        for state in self._states:
            for piece in state.chunk.pieces:
                shape, owner = self._passes.shapes[number], self._pieces[number][1]
                live, region = self._lives[owner], self._regions[owner]
                address, step = 0, 0
                if live is not None:
                    dtype = self._dtypes[region.name]
                    address, step = step_within(piece.region, region, live, dtype, self._device)
                rows.append((start + piece.start_byte, shape.num_rows, shape.row_bytes, address, step))
                number += 1
            start += state.chunk.num_bytes
        return np.array(rows, np.int64)

    def close(self) -> None:
        """See `InPlacePacker`."""
        super().close()
        self._lives = []

    # A version

    def begin(self, version: Version, mode: PackMode, *, rereads: bool = True) -> Snapshot:
        """See `Packer.begin`. When it returns the device is done with the weights: engines may read them."""
        assert self._exposed is not None, "`look` comes first"
        self._totals = [0] * len(self._regions)
        if self._ahead is not None:  # of a version that broke off: it still reads its tables, which this one writes
            self._ahead.running.digests()
        self._ahead = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return super().begin(version, mode, rereads=rereads)

    def pack_next(self, snapshot: Snapshot) -> None:
        """See `Packer.pack_next`."""
        assert self._ahead is None, "a version is packed in runs, or chunk by chunk"
        self._end_run(snapshot, self._begin_run(snapshot.num_ready, 1))

    def pack_run(self, snapshot: Snapshot) -> None:
        """See `Packer.pack_run`: all chunks of which nothing is copied. The next run is begun before this one ends."""
        first = snapshot.num_ready
        run = self._ahead or self._begin_run(first, self._count_run(first))
        after = first + run.count
        self._ahead = self._begin_run(after, self._count_run(after)) if after < len(snapshot) else None
        self._end_run(snapshot, run)

    def digests(self) -> tuple[int, ...]:
        """See `Packer.digests`."""
        return tuple(add_digests(total) for total in self._totals)

    def _count_run(self, first: int) -> int:
        """How many chunks from `first` on are digested at once: what is copied for it may be made, and has a limit."""
        copied_bytes = 0
        for index in range(first, len(self._states)):
            copied_bytes += self._copied_bytes[index]
            if copied_bytes > MAX_MADE_BYTES and index > first:
                return index - first
        return len(self._states) - first

    def _numbers(self, first: int, count: int = 1) -> range:
        span = self._passes.span(first, count)
        return range(span.start, span.stop)

    def _begin_run(self, first: int, count: int) -> _Run:
        assert self._exposed is not None
        numbers = self._numbers(first, count)
        held: list[object] = [self._exposed]
        for number in numbers if any(self._copied_bytes[first : first + count]) else ():
            if self._exposed.packed_starts[number] >= 0:
                piece, owner = self._pieces[number]
                region, live = self._regions[owner], self._take(owner)
                self._packed(number).copy_(live[slices_within(piece.region, region)])
                held.append(live)
        places = self._places[numbers.start : numbers.stop]
        running = self._passes.launch(first, count, places, lambda n: self._find_now(numbers[n]), None, held)
        return _Run(count, running)

    def _end_run(self, snapshot: Snapshot, run: _Run) -> None:
        first = snapshot.num_ready
        states, owners = self._states[first : first + run.count], self._owners_of[first : first + run.count]
        share_out(run.running.digests(), states, owners, self._totals)
        self.delta_bytes += sum(state.chunk.num_bytes for state in states)
        snapshot.num_ready += run.count

    def _take(self, owner: int) -> torch.Tensor:
        """The values of a region that is packed, made once for its pieces, which come one after the other."""
        if self._taken is None or self._taken[0] != owner:
            region = self._regions[owner]
            live = self._lives[owner]
            if live is None:
                live = self._check_shape(region, self._held[region].live()).detach()
            self._taken = owner, live
        return self._taken[1]

    def _packed(self, number: int) -> torch.Tensor:
        """Where a piece is packed, as a tensor of its shape."""
        assert self._exposed is not None and self._exposed.packed is not None
        piece, owner = self._pieces[number]
        start = int(self._exposed.packed_starts[number])
        raw = self._exposed.packed[start : start + piece.num_bytes]
        return raw.view(self._dtypes[self._regions[owner].name]).view(piece.region.shape)

    def _find_now(self, number: int) -> torch.Tensor:
        """A piece where engines read it."""
        assert self._exposed is not None
        if self._exposed.packed_starts[number] >= 0:
            return self._packed(number)
        piece, owner = self._pieces[number]
        live = self._lives[owner]
        assert live is not None
        return live[slices_within(piece.region, self._regions[owner])]

    def _read(self, chunk: Chunk, into: ByteArray) -> None:
        for number in self._numbers(chunk.index):
            piece: Piece = self._pieces[number][0]
            view_piece(piece, self._dtypes[piece.region.name], into).copy_(self._find_now(number))
