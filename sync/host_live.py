"""The packer that packs nothing, of weights in host memory: they are digested, read and sent where they lie.

    packer = HostLivePacker(held, specs, regions, chunks, arena, shares=True)
    packer.look()                           # where the weights lie just now; ReachError when nothing can be done there
    packer.tickets                          # for the announcement: engines of the host read them too
    snapshot = packer.begin(version, "off") # chunks are ready at once; the rest as with `Packer`

As `live_packer`, which does so on a GPU, and at the same price: the weights must stay as they are until the fleet
serves the version. It takes no memory for them, and of the two passes over memory that packing and reading are one is
left.

With `shares` the storages of the weights are moved into shared memory, once, for engines of this host to read. Chunks
with weights that are made or cast for each version, or have strides within their rows, are packed.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_pieces import step_within
from weightcast.sync.errors import ReachError, StorageError
from weightcast.sync.host.arena import Arena
from weightcast.sync.host_bytes import bytes_of
from weightcast.sync.host_packing import PackingPasses
from weightcast.sync.host_passes import has_passes
from weightcast.sync.in_place_packer import InPlacePacker
from weightcast.sync.limits import size_packing_run
from weightcast.sync.live_chunks import LiveChunkState
from weightcast.sync.packer import PackMode
from weightcast.sync.pass_plan import Int64Array, PieceShape
from weightcast.sync.piece_views import slices_within, view_piece
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.scattered import TABLE_FIELDS
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports.shared_memory_live import ExposedPieces, expose_live
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class HostLivePacker(InPlacePacker[ExposedPieces]):
    """See the module. Raises `ReachError` where the loops in C that digest the weights were not built."""

    def __init__(
        self,
        held: Mapping[Region, HeldRegion],
        specs: Mapping[str, TensorSpec],
        regions: Sequence[Region],
        chunks: Sequence[Chunk],
        arena: ByteArray,
        *,
        shares: bool,
    ) -> None:
        if not has_passes():
            raise ReachError("weightcast was installed without a C compiler, and would digest them too slowly")
        super().__init__(held, specs, regions, chunks, arena)
        self._shares = shares
        self._live_passes = PackingPasses(chunks, regions, self._dtypes, self._owners_of)
        self._lives: dict[int, torch.Tensor] = {}
        self._made: set[int] = {n for n, region in enumerate(regions) if held[region].is_made or not region.numel}
        """Regions, by number, of which each call makes a new tensor."""
        self._seen: object = None
        self._packed: Arena | None = None

    # Where the weights lie

    def look(self) -> None:
        """See `InPlacePacker`."""
        lives: dict[int, torch.Tensor] = {}
        for number, region in enumerate(self._regions):
            if number not in self._made:
                live = self._check_shape(region, self._held[region].live()).detach()
                if live.device == _CPU and self._live_passes.can_take(number, live):
                    lives[number] = live
        seen = [(number, live.data_ptr(), live.stride()) for number, live in lives.items()]
        if seen != self._seen:
            self._settle(lives)
            # Storages may have moved meanwhile; a tensor that was made just now lies elsewhere when it is made again.
            self._seen = [(number, live.data_ptr(), live.stride()) for number, live in self._lives.items()]

    def _settle(self, lives: dict[int, torch.Tensor]) -> None:
        for number, live in list(lives.items()):
            if self._held[self._regions[number]].live().data_ptr() != live.data_ptr():
                del lives[number]
                self._made.add(number)
        self.close()
        self._lives = lives
        for state, owners in zip(self._live_states, self._owners_of, strict=True):
            state.is_live = all(owner in lives for owner in owners)
        packed = [state for state in self._live_states if not state.is_live]
        if len(packed) == len(self._live_states):
            raise ReachError("none of the weights lies in host memory as it is published")
        if packed:
            num_bytes = sum(state.chunk.num_bytes for state in packed)
            logger.info("%d of %d bytes are packed: they are made or cast for each version", num_bytes, self.num_bytes)
        if self._shares:
            self._expose(packed)
        for state in self._live_states:
            state.spread = self._spread(state.chunk) if state.is_live else ()

    def _expose(self, packed: Sequence[LiveChunkState]) -> None:
        try:
            if packed:
                self._packed = Arena(sum(state.chunk.num_bytes for state in packed))
                start = 0
                for state in packed:
                    state.bits = self._packed.memory[start : start + state.chunk.num_bytes]
                    start += state.chunk.num_bytes
            self._exposed = expose_live(*self._list_rows(), self._packed)
        except (OSError, ReachError, StorageError) as error:
            logger.warning("engines of this host cannot read the weights where they lie, and are sent them: %s", error)

    def _list_rows(self) -> tuple[Int64Array, int, list[torch.UntypedStorage]]:
        """The table of pieces, the bytes of all chunks, and the storages that the table names."""
        storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        for live in self._lives.values():
            storage = live.untyped_storage()
            storages.setdefault(storage._cdata, (len(storages), storage))
        rows = []
        start = packed_start = 0
        for state, owners in zip(self._live_states, self._owners_of, strict=True):
            for piece, owner in zip(state.chunk.pieces, owners, strict=True):
                region = self._regions[owner]
                shape = PieceShape(piece.region, self._dtypes[region.name].itemsize)
                place = (len(storages), packed_start + piece.start_byte, shape.row_bytes)
                if state.is_live:
                    live = self._lives[owner]
                    address, step = step_within(piece.region, region, live, self._dtypes[region.name], _CPU)
                    if not address:
                        raise ReachError(f"the rows of {region} lie at no even distances")
                    storage = live.untyped_storage()
                    place = (storages[storage._cdata][0], address - storage.data_ptr(), step)
                rows.append((start + piece.start_byte, shape.num_rows, shape.row_bytes, *place))
            start += state.chunk.num_bytes
            packed_start += 0 if state.is_live else state.chunk.num_bytes
        listed = [storage for _, storage in storages.values()]
        return np.array(rows, np.int64).reshape(-1, TABLE_FIELDS), start, listed

    def _spread(self, chunk: Chunk) -> tuple[memoryview, ...]:
        """The chunk's bytes where they lie, one view after the other; nothing where a piece is in several runs."""
        views: list[memoryview] = []
        end = 0
        for piece, owner in zip(chunk.pieces, self._owners_of[chunk.index], strict=True):
            found = self._find(piece, owner)
            if not found.is_contiguous():
                return ()
            if piece.start_byte > end:
                views.append(memoryview(bytes(piece.start_byte - end)))
            views.append(bytes_of(found).data.toreadonly())
            end = piece.start_byte + piece.num_bytes
        return tuple(views)

    def _find(self, piece: Piece, owner: int) -> torch.Tensor:
        return self._lives[owner][slices_within(piece.region, self._regions[owner])]

    def close(self) -> None:
        """See `InPlacePacker`."""
        super().close()
        self._packed, self._lives, self._seen = None, {}, None
        for state in self._live_states:
            state.spread = ()

    # A version

    def move(self, arena: ByteArray) -> None:
        """See `InPlacePacker`."""
        super().move(arena)
        self._seen = None

    def begin(self, version: Version, mode: PackMode, *, rereads: bool = True) -> Snapshot:
        """See `Packer.begin`."""
        assert self._seen is not None, "`look` comes first"
        return super().begin(version, mode, rereads=rereads)

    def pack_next(self, snapshot: Snapshot) -> None:
        """See `Packer.pack_next`."""
        self._pack(snapshot, 1)

    def pack_run(self, snapshot: Snapshot) -> None:
        """See `Packer.pack_run`."""
        first = snapshot.num_ready
        limit = size_packing_run(first, len(self._states) - first, len(self._scratch))
        count = 0
        while count < limit and self._live_states[first + count].is_live:
            count += 1
        self._pack(snapshot, max(1, count))

    def _pack(self, snapshot: Snapshot, count: int) -> None:
        first = snapshot.num_ready
        states = self._live_states[first : first + count]
        if states[0].is_live:
            owners = {owner for state in states for owner in self._owners_of[state.chunk.index]}
            lives = {owner: self._lives[owner] for owner in sorted(owners)}
            digests = self._live_passes.run(first, count, None, lives, self._sums, streams=False)
            for state, found in zip(states, digests, strict=True):
                state.digests = found
        else:
            self._fill(states[0], states[0].host)
            states[0].is_stale = False
        self.delta_bytes += sum(state.chunk.num_bytes for state in states)
        snapshot.num_ready += count

    def _read(self, chunk: Chunk, into: ByteArray) -> None:
        for piece, owner in zip(chunk.pieces, self._owners_of[chunk.index], strict=True):
            view_piece(piece, self._dtypes[piece.region.name], into).copy_(self._find(piece, owner))
