"""A landing: where a whole chunk is received step by step, each digested while it is still in the cache.

    landing = staging.open_landing(rank, header, num_bytes, scratch)
    while len(room := landing.room()):
        landing.advance(socket.recv_into(room))
    staging.land(rank, header, landing)

A large piece that is one run of its tensor's bytes is received where it belongs, up to 1 MiB at a time. Small pieces,
and those that lie in strides, come to scratch memory together, and are copied to their places with their digests.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch

from weightcast.sync.chunks import Chunk, Piece, split_region
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_landing import RunLanding
from weightcast.sync.digest import add_digests, copy_bytes_with_digest
from weightcast.sync.host_bytes import ChunkBytes, find_run
from weightcast.sync.regions import Region
from weightcast.sync.stopwatch import Stopwatch

STEP_BYTES = 1 << 20
# Below it, to receive a piece by itself costs more than to copy it once more.
MIN_DIRECT_BYTES = 64 << 10


class _Step(NamedTuple):
    """Bytes that are received at once: to their place (`region` of piece `first`), or to scratch (several pieces)."""

    target: ByteArray
    first: int
    last: int
    region: Region | None
    dtype: torch.dtype | None


class Landing:
    """See the module. `owner` is the staging whose memory is written; `scratch` holds a whole chunk.

    `land_piece` brings a piece out of a chunk's bytes to its place, and returns its digest.
    """

    def __init__(
        self,
        owner: object,
        chunk: Chunk,
        tensors: Mapping[str, torch.Tensor],
        raw_of: Callable[[str], ByteArray],
        land_piece: Callable[[Piece, ByteArray], int],
        scratch: ByteArray,
    ) -> None:
        assert len(scratch) >= chunk.num_bytes
        self.owner = owner
        self.checking = Stopwatch()
        """Digests of what lies where it belongs."""
        self._chunk = chunk
        self._tensors = tensors
        self._raw_of = raw_of
        self._land_piece = land_piece
        self._scratch = scratch
        self._digests = [0] * len(chunk.pieces)
        self._steps = self._list_steps()
        self._number = 0
        self._room = self._steps[0].target.data

    def __len__(self) -> int:
        return self._chunk.num_bytes

    @property
    def digests(self) -> tuple[int, ...]:
        """Of each piece, once all is here."""
        assert not len(self._room), "the chunk has not come whole"
        return tuple(self._digests)

    def room(self) -> memoryview:
        """Where the next bytes go; empty when all are here."""
        return self._room

    def advance(self, num_bytes: int) -> None:
        """So many bytes came there."""
        self._room = self._room[num_bytes:]
        if not len(self._room):
            self._finish(self._steps[self._number])
            self._number += 1
            if self._number < len(self._steps):
                self._room = self._steps[self._number].target.data

    def _finish(self, step: _Step) -> None:
        if step.region is not None and step.dtype is not None:
            with self.checking:
                digest = copy_bytes_with_digest(step.target, step.target, step.region, step.dtype)
            self._digests[step.first] = add_digests(self._digests[step.first], digest)
            return
        for number in range(step.first, step.last):
            self._digests[number] = self._land_piece(self._chunk.pieces[number], self._scratch)

    def _list_steps(self) -> Sequence[_Step]:
        steps: list[_Step] = []
        first = end_byte = 0
        pieces = self._chunk.pieces
        for number, piece in enumerate(pieces):
            cuts = self._find_cuts(piece)
            if cuts is None:
                continue
            if piece.start_byte > end_byte:
                steps.append(self._gather(first, number, end_byte, piece.start_byte))
            name = piece.region.name
            raw, dtype = self._raw_of(name), self._tensors[name].dtype
            steps += (_Step(raw[start:end], number, number + 1, region, dtype) for start, end, region in cuts)
            first, end_byte = number + 1, piece.start_byte + piece.num_bytes
        if end_byte < self._chunk.num_bytes:
            steps.append(self._gather(first, len(pieces), end_byte, self._chunk.num_bytes))
        return steps

    def _gather(self, first: int, last: int, start_byte: int, end_byte: int) -> _Step:
        return _Step(self._scratch[start_byte:end_byte], first, last, None, None)

    def _find_cuts(self, piece: Piece) -> "tuple[tuple[int, int, Region], ...] | None":
        tensor = self._tensors[piece.region.name]
        if piece.num_bytes < MIN_DIRECT_BYTES or not tensor.is_contiguous():
            return None
        return _cut_run(piece.region, tuple(tensor.shape), tensor.element_size())


Body: TypeAlias = ChunkBytes | Landing | RunLanding
"""A chunk's body: its bytes, or the landing by which they came to their places; or that of many chunks."""


@lru_cache(maxsize=1 << 14)
def _cut_run(region: Region, whole: tuple[int, ...], itemsize: int) -> "tuple[tuple[int, int, Region], ...] | None":
    """(first byte, last, region) of each step of a box in the bytes of its tensor; None when it is not one run."""
    start_byte = find_run(region.shape, region.offset, whole, itemsize)
    if start_byte is None:
        return None
    cuts = []
    for part in split_region(region, STEP_BYTES // itemsize):
        num_bytes = part.numel * itemsize
        cuts.append((start_byte, start_byte + num_bytes, part))
        start_byte += num_bytes
    return tuple(cuts)
