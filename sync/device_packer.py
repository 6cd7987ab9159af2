"""The packer of a source whose weights are on a GPU: it packs, digests and compares there.

    packer = DevicePacker(held, specs, regions, chunks, arena, history, there, host_is_read=False)

`there` is memory on the device for all chunks. It has the bits of the version that was packed last, as the host's arena
has for `Packer`: what the next version is compared with, and what engines read that can (`cuda_ipc`). What changed is
found before anything is copied to the host, and is the same, byte by byte, as `Packer` finds.

The host's arena follows: a delta is applied to it, and a chunk that changed too much is copied down when somebody asks
for it. Where engines read the arena by themselves (`host_is_read`) it is always up to date.

Keeping the last bits on the device costs this rank's share of its memory once more. Without that (`find_room`) the
host's arena is compared with, by `Packer`: sending that up to the device, chunk by chunk, would move as many bytes as
bringing the new ones down, and saves nothing.
"""

import logging
from collections.abc import Mapping, Sequence

import torch

from weightcast.sync.chunk_delta import ChunkDelta, Part, apply_chunk, list_parts
from weightcast.sync.chunks import ALIGNMENT_BYTES, Chunk
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_bits import aligned, count_changes_on_device, encode_chunk_on_device, view_on_device
from weightcast.sync.digest_torch import as_digests, region_sum
from weightcast.sync.packer import Packer, PackMode, slices_within
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.snapshot import MAX_DELTA_SHARE, ChunkState, Snapshot
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)

# Of a device's memory, what is left to the trainer when the last bits are kept there.
RESERVE_SHARE = 0.1


class DeviceChunkState(ChunkState):
    """A chunk whose bits are `there`, on a device; the host's copy is made when it is looked at."""

    __slots__ = ("_host", "is_stale", "sums", "there")

    def __init__(
        self, chunk: Chunk, parts: tuple[Part, ...], host: ByteArray, there: torch.Tensor, history: int
    ) -> None:
        self.there = there
        self.is_stale = False
        self.sums: torch.Tensor | None = None
        """Its pieces' digests, there."""
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

    def piece_digests(self) -> Sequence[int]:
        """See `ChunkState`; waits for the device."""
        return () if self.sums is None else as_digests(list(self.sums))

    def follow(self, delta: ChunkDelta | None) -> None:
        """The bits on the device went on by `delta`; None for more than that says."""
        if delta is None:
            self.is_stale = True
        elif not delta.is_same and not self.is_stale:
            apply_chunk(delta.forward, self.parts, self._host)


class DevicePacker(Packer):
    """See the module."""

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
        self._fresh = torch.zeros(
            max((chunk.num_bytes for chunk in chunks), default=0), dtype=torch.uint8, device=there.device
        )
        self._sums: dict[Region, torch.Tensor] = {}
        states: list[ChunkState] = []
        start = 0
        for state in self._states:
            end = start + state.chunk.num_bytes
            parts = list_parts(state.chunk, self._dtypes)
            states.append(DeviceChunkState(state.chunk, parts, state.bits, there[start:end], history))
            start = end
        self._states = states

    def begin(self, version: Version, mode: PackMode, *, rereads: bool = True) -> Snapshot:
        """See `Packer.begin`."""
        self._sums.clear()
        return super().begin(version, mode, rereads=rereads)

    def pack_next(self, snapshot: Snapshot) -> None:
        """See `Packer.pack_next`; when it returns, the device is done with the chunk."""
        state = self._states[snapshot.num_ready]
        assert isinstance(state, DeviceChunkState)
        if self._mode == "off" or state.version is None:
            state.version = None
            whole = self._fill_there(state, state.there)
            if whole is not state.there:
                state.there.copy_(whole)
            state.follow(None)
            state.advance(snapshot.version, None)
            self.delta_bytes += state.chunk.num_bytes
        else:
            self._pack_change_there(state, snapshot.version)
        if self._host_is_read:
            _ = state.bits
        if state.there.device.type == "cuda":
            torch.cuda.current_stream(state.there.device).synchronize()
        snapshot.num_ready += 1

    def digests(self) -> tuple[int, ...]:
        """See `Packer.digests`."""
        found = dict(zip(self._sums, as_digests(list(self._sums.values())), strict=True))
        return tuple(found.get(region, 0) for region in self._regions)

    def _pack_change_there(self, state: DeviceChunkState, version: Version) -> None:
        fresh = self._fill_there(state, self._fresh)
        base = aligned(state.there)
        old = [part.elements(state.bits) for part in state.parts] if self._mode == "zstd" else None
        delta = encode_chunk_on_device(base, fresh, state.parts, int(MAX_DELTA_SHARE * state.chunk.num_bytes), old)
        self._count(state.chunk, delta, lambda: count_changes_on_device(base, fresh, state.parts))
        if delta is None or not delta.is_same:
            state.there.copy_(fresh)
        state.follow(delta)
        state.advance(version, delta)

    def _fill_there(self, state: DeviceChunkState, buffer: torch.Tensor) -> torch.Tensor:
        """Copy a chunk's pieces into `buffer`, or where that begins at an odd byte into memory of this packer's own.

        Returns the memory that has the bytes, and adds the pieces' digests to those of their regions.
        """
        if buffer.storage_offset() % ALIGNMENT_BYTES:
            buffer = self._fresh
        buffer = buffer if buffer.numel() == state.chunk.num_bytes else buffer[: state.chunk.num_bytes]
        end, totals = 0, []
        for piece in state.chunk.pieces:
            if end < piece.start_byte:
                buffer[end : piece.start_byte] = 0
            end = piece.start_byte + piece.num_bytes
            region, live = self._find(piece.region)
            target = view_on_device(piece, self._dtypes[region.name], buffer)
            target.copy_(live.detach()[slices_within(piece.region, region)])
            total = region_sum(target, piece.region)
            self._sums[region] = total if region not in self._sums else self._sums[region] + total
            totals.append(total)
        state.sums = torch.stack(totals)
        return buffer


def has_room(free_bytes: int, total_bytes: int, num_bytes: int) -> bool:
    """Whether a device may keep `num_bytes` more and leave the trainer its reserve. Pure."""
    return num_bytes + RESERVE_SHARE * total_bytes <= free_bytes


def find_room(regions: Sequence[Region], held: Mapping[Region, HeldRegion], num_bytes: int) -> torch.Tensor | None:
    """Memory for the last bits on the GPU that holds these weights; None on a CPU, and where it has too little."""
    first = next((region for region in regions if region.numel), None)
    if first is None:
        return None
    device = held[first].live().device
    if device.type != "cuda":
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    if not has_room(free_bytes, total_bytes, num_bytes):
        logger.info(
            "what changed is found on the host: %s has %d bytes free, and %d are needed besides a reserve of %d",
            *(device, free_bytes, num_bytes, int(RESERVE_SHARE * total_bytes)),
        )
        return None
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
