"""Snapshots: a source's part of a version, packed in host memory.

`Snapshot.pack` copies the live regions into chunks, hashes each chunk and digests each region, in one pass while the
bytes are in cache. From then on the trainer may change its parameters: late engines are served from the snapshot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.digest import add_digests, region_digest
from weightcast.sync.errors import SourceError
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.version import Version


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The chunks of one version on one source. `digests` has one entry a region, in the order of the regions."""

    version: Version
    chunks: tuple[Chunk, ...]
    buffers: tuple[memoryview, ...]
    hashes: bytes
    digests: tuple[int, ...]


def allocate_arena(chunks: Sequence[Chunk]) -> npt.NDArray[np.uint8]:
    """Memory for all chunks of a source. Zeroed, so that the gaps between pieces are the same every time."""
    return np.zeros(sum(chunk.num_bytes for chunk in chunks), np.uint8)


def pack_snapshot(
    version: Version,
    held: Mapping[Region, HeldRegion],
    specs: Mapping[str, TensorSpec],
    regions: Sequence[Region],
    chunks: tuple[Chunk, ...],
    arena: npt.NDArray[np.uint8],
) -> Snapshot:
    """Copy `regions` from their live views into `arena`, laid out as `chunks`.

    Views are cast to the spec's dtype. Raises `SourceError` when a live view no longer has its region's shape.
    """
    owner = _Owners(regions, held)
    digests = dict.fromkeys(regions, 0)
    hashes: list[bytes] = []
    buffers: list[memoryview] = []
    start = 0
    for chunk in chunks:
        buffer = arena[start : start + chunk.num_bytes]
        start += chunk.num_bytes
        for piece in chunk.pieces:
            region, live = owner.find(piece.region)
            packed = _copy_piece(piece, region, live, specs[region.name].dtype, buffer)
            digests[region] = add_digests(digests[region], region_digest(packed, piece.region))
        hashes.append(xxhash.xxh3_128_digest(buffer.data))
        buffers.append(buffer.data.toreadonly())
    return Snapshot(version, chunks, tuple(buffers), b"".join(hashes), tuple(digests.values()))


class _Owners:
    """Finds the region that a piece was cut from. Pieces come in the order of the regions, so it only walks on."""

    def __init__(self, regions: Sequence[Region], held: Mapping[Region, HeldRegion]) -> None:
        self._rest = iter(regions)
        self._held = held
        self._left_elements = 0
        self._region: Region | None = None
        self._live = torch.empty(0)

    def find(self, piece: Region) -> tuple[Region, torch.Tensor]:
        """The region around `piece`, and its live view, taken once a region."""
        while self._left_elements == 0:
            self._region = next(self._rest)
            self._left_elements = self._region.numel
            self._live = self._held[self._region].live()
            if tuple(self._live.shape) != self._region.shape:
                raise SourceError(
                    f"the live view of {self._region} has the shape {tuple(self._live.shape)}; "
                    "the model changed after its plan was made: make the publisher after the model is wrapped"
                )
        assert self._region is not None and piece.name == self._region.name
        self._left_elements -= piece.numel
        return self._region, self._live


def _copy_piece(
    piece: Piece, region: Region, live: torch.Tensor, dtype: torch.dtype, buffer: npt.NDArray[np.uint8]
) -> torch.Tensor:
    target = view_piece(piece, dtype, buffer)
    local = tuple(
        slice(start - base, start - base + size)
        for start, base, size in zip(piece.region.offset, region.offset, piece.region.shape, strict=True)
    )
    target.copy_(live[local])
    return target


def view_piece(piece: Piece, dtype: torch.dtype, buffer: npt.NDArray[np.uint8]) -> torch.Tensor:
    """The piece's place in a chunk's bytes, as a tensor of the piece's shape."""
    raw = torch.from_numpy(buffer[piece.start_byte : piece.start_byte + piece.num_bytes])
    return raw.view(dtype).view(piece.region.shape)
