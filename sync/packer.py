"""The packer: copies a source's live regions into its arena, chunk by chunk, and finds what changed.

    packer = Packer(held, specs, regions, chunks, arena, history=4)
    snapshot = packer.begin(version, "on")
    while snapshot.num_ready < len(snapshot):
        packer.pack_run(snapshot)           # from here on chunks below `num_ready` may be served, and the rest goes on
    packer.digests()                        # one a region: their sums over the sources vouch for whole tensors

The arena always holds the bits of the version that was packed last, so it is also what the next version is compared
with: a delta costs the source no second copy of its share. From the moment that a chunk is packed the trainer may
change its parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.chunk_delta import ChunkDelta, count_changes, encode_chunk, list_parts
from weightcast.sync.chunks import Chunk
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_pieces import find_owners
from weightcast.sync.digest import add_digests, copy_with_digest
from weightcast.sync.errors import SourceError
from weightcast.sync.host_packing import PackingPasses
from weightcast.sync.host_passes import has_passes
from weightcast.sync.limits import size_packing_run
from weightcast.sync.piece_views import slices_within, view_piece
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.snapshot import MAX_DELTA_SHARE, ChunkState, Snapshot
from weightcast.sync.version import Version

PackMode: TypeAlias = Literal["off", "on", "zstd"]
"""Whether a version is compared with the one before: not at all, or for deltas, plain or entropy-coded."""


class Packer:
    """See the module. `chunks` is the layout of `regions`; `history` says over how many versions deltas may reach."""

    is_in_place = False
    """Whether engines read the weights themselves, which must then stay as they are until they have (`live_packer`)."""
    packs_into_arena = True
    """Whether chunks that are counted ready lie in `arena`."""

    def __init__(
        self,
        held: Mapping[Region, HeldRegion],
        specs: Mapping[str, TensorSpec],
        regions: Sequence[Region],
        chunks: Sequence[Chunk],
        arena: ByteArray,
        history: int,
    ) -> None:
        dtypes = {name: spec.dtype for name, spec in specs.items()}
        self.arena = arena
        self.num_bytes = sum(chunk.num_bytes for chunk in chunks)
        self.delta_bytes = 0
        self.changed_elements: int | None = None
        self._held = held
        self._dtypes = dtypes
        self._regions = regions
        self._scratch = np.zeros(max((chunk.num_bytes for chunk in chunks), default=0), np.uint8)
        self._states = [
            ChunkState(chunk, list_parts(chunk, dtypes), bits, history)
            for chunk, bits in zip(chunks, cut_arena(arena, chunks), strict=True)
        ]
        self._mode: PackMode = "off"
        self._rereads = True
        self._chunks = chunks
        self._host_passes: PackingPasses | None = None
        self._owners_of = find_owners(chunks, regions)
        self._taken: tuple[int, torch.Tensor] | None = None
        self._sums: npt.NDArray[np.uint64] = np.zeros(len(regions), np.uint64)

    def move(self, arena: ByteArray) -> None:
        """Go on in other memory, with the same bits: the old arena is still read by somebody."""
        arena[:] = self.arena
        self.arena = arena
        for state, bits in zip(self._states, cut_arena(arena, [state.chunk for state in self._states]), strict=True):
            state.bits = bits

    def begin(self, version: Version, mode: PackMode, *, rereads: bool = True) -> Snapshot:
        """A snapshot of which no chunk is packed yet. The one before must not be served any more.

        `rereads` says that this process reads chunks again at once, to hash and send them.
        """
        self._mode = mode if any(state.version is not None for state in self._states) else "off"
        self._rereads = rereads or self._mode != "off"
        self.delta_bytes = 0
        self.changed_elements = None if self._mode == "off" else 0
        self._sums[:] = 0
        self._taken = None
        is_whole = self._mode == "off"
        arena = self.arena if self.packs_into_arena else None
        return Snapshot(version, self._states, self._mode == "zstd", is_whole=is_whole, arena=arena)

    def pack_next(self, snapshot: Snapshot) -> None:
        """Pack the next chunk. Raises `SourceError` when a live view no longer has its region's shape."""
        state = self._states[snapshot.num_ready]
        if self._mode == "off" or state.version is None:
            # Should the copy break off, these bits are no version's.
            state.version = None
            self._fill(state, state.bits)
            state.advance(snapshot.version, None)
            self.delta_bytes += state.chunk.num_bytes
        else:
            self._pack_change(state, snapshot.version)
        snapshot.num_ready += 1

    def pack_run(self, snapshot: Snapshot) -> None:
        """Pack the next chunk, and as many after it as are best packed together."""
        count = self._count_whole(snapshot.num_ready)
        if count < 2:
            self.pack_next(snapshot)
        else:
            self._pack_whole(snapshot, count)

    def _count_whole(self, first: int) -> int:
        """How many chunks from `first` on, which nothing is compared with, are packed by one call."""
        if not has_passes():
            return 0
        states = self._states[first : first + size_packing_run(first, len(self._states) - first, len(self._scratch))]
        return sum(1 for _ in takewhile(lambda state: self._mode == "off" or state.version is None, states))

    def _pack_whole(self, snapshot: Snapshot, count: int) -> None:
        if self._host_passes is None:
            self._host_passes = PackingPasses(self._chunks, self._regions, self._dtypes, self._owners_of)
        first = snapshot.num_ready
        states = self._states[first : first + count]
        for state in states:
            # Should the copy break off, these bits are no version's.
            state.version = None
        owners = range(self._owners_of[first][0], self._owners_of[first + count - 1][-1] + 1)
        lives = {owner: self._take(owner) for owner in owners}
        digests = self._host_passes.run(first, count, self.arena, lives, self._sums, streams=not self._rereads)
        for state, found in zip(states, digests, strict=True):
            state.digests = found
            state.advance(snapshot.version, None)
            self.delta_bytes += state.chunk.num_bytes
        snapshot.num_ready += count

    def digests(self) -> tuple[int, ...]:
        """The digest of each region, once all chunks are packed."""
        return tuple(self._sums.tolist())

    def _pack_change(self, state: ChunkState, version: Version) -> None:
        fresh = self._scratch[: state.chunk.num_bytes]
        self._fill(state, fresh)
        max_bytes = int(MAX_DELTA_SHARE * state.chunk.num_bytes)
        delta = encode_chunk(state.bits, fresh, state.parts, max_bytes, pack=self._mode == "zstd")
        self._count(state.chunk, delta, lambda: count_changes(state.bits, fresh, state.parts))
        if delta is None or not delta.is_same:
            state.bits[:] = fresh
        state.advance(version, delta)

    def _count(self, chunk: Chunk, delta: ChunkDelta | None, count: Callable[[], int]) -> None:
        """Add up what changed in a chunk; without a delta `count` says how many elements."""
        assert self.changed_elements is not None
        if delta is None:
            self.delta_bytes += chunk.num_bytes
            self.changed_elements += count()
        else:
            self.delta_bytes += len(delta.packed if delta.packed is not None else delta.forward)
            self.changed_elements += delta.num_changes

    def _fill(self, state: ChunkState, buffer: ByteArray) -> None:
        """Copy a chunk's pieces from their live views into `buffer`, and digest them while they are in cache."""
        end, digests = 0, []
        for piece, owner in zip(state.chunk.pieces, self._owners_of[state.chunk.index], strict=True):
            buffer[end : piece.start_byte] = 0  # the scratch buffer had other chunks before
            end = piece.start_byte + piece.num_bytes
            region, live = self._regions[owner], self._take(owner)
            target = view_piece(piece, self._dtypes[region.name], buffer)
            source = live[slices_within(piece.region, region)]
            digest = copy_with_digest(target, source, piece.region, reread=self._rereads)
            self._sums[owner] = add_digests(int(self._sums[owner]), digest)
            digests.append(digest)
        state.digests = digests

    def _take(self, owner: int) -> torch.Tensor:
        """The live view of a region, by its number, taken once for its pieces, which come one after the other."""
        if self._taken is None or self._taken[0] != owner:
            region = self._regions[owner]
            self._taken = owner, self._check_shape(region, self._held[region].live())
        return self._taken[1]

    def _check_shape(self, region: Region, live: torch.Tensor) -> torch.Tensor:
        if live.shape != region.shape:
            raise SourceError(
                f"the live view of {region} has the shape {tuple(live.shape)}; "
                "the model changed after its plan was made: make the publisher after the model is wrapped"
            )
        return live


def cut_arena(arena: ByteArray, chunks: Sequence[Chunk]) -> Iterator[ByteArray]:
    """Each chunk's share of memory that holds one after the other."""
    start = 0
    for chunk in chunks:
        yield arena[start : start + chunk.num_bytes]
        start += chunk.num_bytes
