"""The packer of a source whose weights are on a GPU: it packs, digests and compares there.

    packer = DevicePacker(held, specs, regions, chunks, arena, history, there, host_is_read=False)

`there` is memory on the device for all chunks. It has the bits of the version that was packed last, as the host's arena
has for `Packer`: what the next version is compared with, and what engines read that can (`cuda_ipc`). What changed is
found before anything is copied to the host, and is the same, byte by byte, as `Packer` finds.

The host's arena follows: a delta is applied to it, and a chunk that changed too much is copied down when somebody asks
for it. Where engines read the arena by themselves (`host_is_read`) it is always up to date.

Keeping the last bits on the device costs this rank's share of its memory once more. Without that (`device_room`) the
host's arena is compared with, by `Packer`: sending that up to the device, chunk by chunk, would move as many bytes as
bringing the new ones down, and saves nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightcast.sync.chunk_delta import ChunkDelta, Part, apply_chunk, list_parts
from weightcast.sync.chunks import ALIGNMENT_BYTES, Chunk, Piece
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_bits import aligned, count_changes_on_device, encode_chunk_on_device, view_on_device
from weightcast.sync.device_passes import ChunkPasses, RunningPass
from weightcast.sync.device_pieces import place_within, share_out
from weightcast.sync.digest import add_digests
from weightcast.sync.limits import size_device_run
from weightcast.sync.packer import Packer, PackMode
from weightcast.sync.pass_plan import PLACE_FIELDS
from weightcast.sync.piece_views import slices_within
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.snapshot import MAX_DELTA_SHARE, ChunkState, Snapshot
from weightcast.sync.version import Version

# Of weights that are made when they are asked for, about so much is made at a time.
MAX_MADE_BYTES = 256 << 20


class DeviceChunkState(ChunkState):
    """A chunk whose bits are `there`, on a device; the host's copy is made when it is looked at."""

    __slots__ = ("_host", "is_stale", "there")

    def __init__(
        self, chunk: Chunk, parts: tuple[Part, ...], host: ByteArray, there: torch.Tensor, history: int
    ) -> None:
        self.there = there
        self.is_stale = False
        super().__init__(chunk, parts, host, history)

    @property
    def bits(self) -> ByteArray:
        """The chunk's bytes on the host."""
        if self.is_stale:
            torch.from_numpy(self._host).copy_(self.there)
            self.is_stale = False
        return self._host

    @bits.setter
    def bits(self, host: ByteArray) -> None:
        self._host = host

    def follow(self, delta: ChunkDelta | None) -> None:
        """The bits on the device went on by `delta`; None for more than that says."""
        if delta is None:
            self.is_stale = True
        elif not delta.is_same and not self.is_stale:
            apply_chunk(delta.forward, self.parts, self._host)


@dataclass(frozen=True, slots=True)
class _Run:
    """Chunks that are being packed at once."""

    count: int
    running: RunningPass


class DevicePacker(Packer):
    """See the module."""

    packs_into_arena = False  # chunks are copied to the host when they are asked for

    def __init__(
        self,
        held: Mapping[Region, HeldRegion],
        specs: Mapping[str, TensorSpec],
        regions: Sequence[Region],
        chunks: Sequence[Chunk],
        arena: ByteArray,
        history: int,
        there: torch.Tensor,
        *,
        host_is_read: bool,
    ) -> None:
        super().__init__(held, specs, regions, chunks, arena, history)
        self._host_is_read = host_is_read
        self._chunk_bytes = max((chunk.num_bytes for chunk in chunks), default=0)
        self._fresh = torch.zeros(self._chunk_bytes, dtype=torch.uint8, device=there.device)
        states: list[ChunkState] = []
        start = 0
        for state in self._states:
            end = start + state.chunk.num_bytes
            parts = list_parts(state.chunk, self._dtypes)
            states.append(DeviceChunkState(state.chunk, parts, state.bits, there[start:end], history))
            start = end
        self._states = states
        self._passes = ChunkPasses(chunks, self._dtypes, there.device)
        self._made_bytes = [
            sum(piece.num_bytes for piece, n in zip(chunk.pieces, owners, strict=True) if held[regions[n]].is_made)
            for chunk, owners in zip(chunks, self._owners_of, strict=True)
        ]
        self._totals = [0] * len(regions)
        self._ahead: _Run | None = None

    def begin(self, version: Version, mode: PackMode, *, rereads: bool = True) -> Snapshot:
        """See `Packer.begin`."""
        self._drop_ahead()
        self._totals = [0] * len(self._regions)
        return super().begin(version, mode, rereads=rereads)

    def pack_next(self, snapshot: Snapshot) -> None:
        """See `Packer.pack_next`; when it returns, the device is done with the chunk."""
        assert self._ahead is None, "a version is packed in runs, or chunk by chunk"
        if self._count_run(snapshot.num_ready):
            self._end_run(snapshot, self._begin_run(snapshot.num_ready, 1))
        else:
            self._pack_alone(snapshot)

    def pack_run(self, snapshot: Snapshot) -> None:
        """See `Packer.pack_run`. The run after it is begun before this one has ended: the device never waits."""
        first = snapshot.num_ready
        run, self._ahead = self._ahead, None
        if run is None:
            count = self._count_run(first)
            if not count:
                self._pack_alone(snapshot)
                return
            run = self._begin_run(first, count)
        after = first + run.count
        if following := self._count_run(after):
            self._ahead = self._begin_run(after, following)
        self._end_run(snapshot, run)

    def digests(self) -> tuple[int, ...]:
        """See `Packer.digests`."""
        return tuple(add_digests(total) for total in self._totals)

    # Whole chunks, many at once

    def _drop_ahead(self) -> None:
        """Wait for a run of a version that broke off: it still reads its tables, which the next one writes."""
        run, self._ahead = self._ahead, None
        if run is not None:
            run.running.digests()

    def _count_run(self, first: int) -> int:
        """How many chunks from `first` on are packed at once; 0 where that one goes alone."""
        num_left = len(self._states) - first
        limit = size_device_run(first, num_left, self._chunk_bytes) if num_left > 0 else 0
        made_bytes = 0
        for index in range(first, first + limit):
            state, made_bytes = self._state(index), made_bytes + self._made_bytes[index]
            if not self._is_whole(state) or not _is_aligned(state) or (made_bytes > MAX_MADE_BYTES and index > first):
                return index - first
        return limit

    def _begin_run(self, first: int, count: int) -> _Run:
        for state in self._states[first : first + count]:
            # Should the copy break off, these bits are no version's.
            state.version = None
        return _Run(count, self._launch(first, count, None))

    def _end_run(self, snapshot: Snapshot, run: _Run) -> None:
        first = snapshot.num_ready
        self._note_digests(first, run.count, run.running)
        for index in range(first, first + run.count):
            self._note_whole(self._state(index), snapshot.version)
        snapshot.num_ready += run.count

    def _note_whole(self, state: DeviceChunkState, version: Version) -> None:
        state.follow(None)
        state.advance(version, None)
        self.delta_bytes += state.chunk.num_bytes
        if self._host_is_read:
            _ = state.bits

    # One chunk: what changed of it, or one that begins where nothing can be viewed in place

    def _pack_alone(self, snapshot: Snapshot) -> None:
        index = snapshot.num_ready
        state, fresh = self._state(index), self._fresh[: self._states[index].chunk.num_bytes]
        is_whole = self._is_whole(state)
        if is_whole:
            state.version = None
        running = self._launch(index, 1, fresh)
        if is_whole:
            state.there.copy_(fresh)
            self._note_digests(index, 1, running)
            self._note_whole(state, snapshot.version)
        else:
            self._pack_change_there(state, fresh, snapshot.version)
            self._note_digests(index, 1, running)
            if self._host_is_read:
                _ = state.bits
        if fresh.device.type == "cuda":
            torch.cuda.current_stream(fresh.device).synchronize()
        snapshot.num_ready += 1

    def _pack_change_there(self, state: DeviceChunkState, fresh: torch.Tensor, version: Version) -> None:
        base = aligned(state.there)
        old = [part.elements(state.bits) for part in state.parts] if self._mode == "zstd" else None
        delta = encode_chunk_on_device(base, fresh, state.parts, int(MAX_DELTA_SHARE * state.chunk.num_bytes), old)
        self._count(state.chunk, delta, lambda: count_changes_on_device(base, fresh, state.parts))
        if delta is None or not delta.is_same:
            state.there.copy_(fresh)
        state.follow(delta)
        state.advance(version, delta)

    # Both

    def _is_whole(self, state: ChunkState) -> bool:
        """Whether a chunk is packed without a look at what it was."""
        return self._mode == "off" or state.version is None

    def _state(self, index: int) -> DeviceChunkState:
        state = self._states[index]
        assert isinstance(state, DeviceChunkState)
        return state

    def _launch(self, first: int, count: int, fresh: torch.Tensor | None) -> RunningPass:
        """Begin to copy chunks from their live views to where they lie on the device, or one of them into `fresh`."""
        found: list[tuple[Piece, Region, torch.Tensor, torch.Tensor]] = []
        rows: list[tuple[int, int, int, int]] = []
        row_lanes = iter(self._passes.row_lanes[self._passes.span(first, count)])
        for state in map(self._state, range(first, first + count)):
            buffer = state.there if fresh is None else fresh
            address, end = buffer.data_ptr(), 0
            for piece, owner in zip(state.chunk.pieces, self._owners_of[state.chunk.index], strict=True):
                if fresh is not None and end < piece.start_byte:
                    buffer[end : piece.start_byte] = 0  # it had other chunks before
                end = piece.start_byte + piece.num_bytes
                region, live = self._regions[owner], self._take(owner)
                found.append((piece, region, live, buffer))
                source = place_within(piece.region, region, live, self._dtypes[region.name], buffer.device)
                rows.append((*source, address + piece.start_byte, next(row_lanes)))

        def find_source(number: int) -> torch.Tensor:
            piece, region, live, _ = found[number]
            return live.detach()[slices_within(piece.region, region)]

        def find_target(number: int) -> torch.Tensor:
            piece, region, _, buffer = found[number]
            return view_on_device(piece, self._dtypes[region.name], buffer)

        places = np.array(rows, np.int64).reshape(-1, PLACE_FIELDS)
        return self._passes.launch(first, count, places, find_source, find_target, found)

    def _note_digests(self, first: int, count: int, running: RunningPass) -> None:
        """Add up what a pass found; waits for it."""
        span = slice(first, first + count)
        share_out(running.digests(), self._states[span], self._owners_of[span], self._totals)


def _is_aligned(state: DeviceChunkState) -> bool:
    """Whether pieces of every dtype may be viewed where the chunk lies."""
    return not state.there.storage_offset() % ALIGNMENT_BYTES
