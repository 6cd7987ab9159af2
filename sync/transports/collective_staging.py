"""What the two ends of a broadcast by itself need: chunks from live regions, and tensors from chunks.

`RegionPacker` copies a source's regions chunk by chunk, straight into a bucket, and digests them on the way;
`TensorAssembler` puts chunks of several sources into whole tensors and believes them when their digests add up. Neither
holds more of a model than the tensors themselves.

A tensor's digest is the sum of what the sources say of their regions: see `weightcast.sync.digest`.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from weightcast.sync.chunks import Chunk, Piece, lay_out_chunks
from weightcast.sync.digest import MASK, region_digest
from weightcast.sync.errors import ModelMismatch, SourceError, WireError
from weightcast.sync.regions import HeldRegion, Region, TensorSpec

Bytes = npt.NDArray[np.uint8]


def view_pieces(chunk: Chunk, dtypes: Mapping[str, torch.dtype], buffer: Bytes) -> list[torch.Tensor]:
    """Each piece's place in a chunk's bytes, as a tensor of the piece's shape."""
    raw = torch.from_numpy(buffer)
    return [
        raw[piece.start_byte : piece.start_byte + piece.num_bytes]
        .view(dtypes[piece.region.name])
        .view(piece.region.shape)
        for piece in chunk.pieces
    ]


def _local(piece: Region, region: Region) -> tuple[slice, ...]:
    """Where a piece lies inside the region that it was cut from."""
    return tuple(
        slice(start - base, start - base + size)
        for start, base, size in zip(piece.offset, region.offset, piece.shape, strict=True)
    )


class RegionPacker:
    """Packs one version of a source's regions; `pack` is called for chunk 0, 1, ... in order."""

    def __init__(
        self,
        regions: Sequence[Region],
        held: Mapping[Region, HeldRegion],
        dtypes: Mapping[str, torch.dtype],
        chunks: Sequence[Chunk],
    ) -> None:
        self._dtypes = dtypes
        self._chunks = chunks
        self._held = held
        self._digests = dict.fromkeys(regions, 0)
        self._rest = (region for region in regions if region.numel)
        self._region: Region | None = None
        self._live = torch.empty(0)
        self._left_elements = 0

    def pack(self, index: int, into: Bytes) -> bytes:
        """Fill `into` with a chunk and return its xxh3-128. `SourceError` when a live view changed its shape."""
        chunk = self._chunks[index]
        end = 0
        for piece in chunk.pieces:
            into[end : piece.start_byte] = 0  # gaps hold what the buffer had before
            end = piece.start_byte + piece.num_bytes
        targets = view_pieces(chunk, self._dtypes, into)
        for piece, target in zip(chunk.pieces, targets, strict=True):
            region, live = self._find(piece)
            whole = piece.region.shape == region.shape
            target.copy_(live if whole else live[_local(piece.region, region)])
            self._digests[region] = (self._digests[region] + region_digest(target, piece.region)) & MASK
        return xxhash.xxh3_128_digest(into.data)

    def _find(self, piece: Piece) -> tuple[Region, torch.Tensor]:
        """The region around a piece, and its live view, taken once a region: pieces come in the regions' order."""
        if not self._left_elements:
            self._region = next(self._rest)
            self._left_elements = self._region.numel
            self._live = self._held[self._region].live()
            if tuple(self._live.shape) != self._region.shape:
                raise SourceError(
                    f"the live view of {self._region} has the shape {tuple(self._live.shape)}; "
                    "the model changed after its plan was made: make the source after the model is wrapped"
                )
        assert self._region is not None and piece.region.name == self._region.name
        self._left_elements -= piece.region.numel
        return self._region, self._live

    def digests(self) -> bytes:
        """8 bytes a region, little-endian, in the order of the regions; for use when all chunks are packed."""
        return np.array(list(self._digests.values()), "<u8").tobytes()


def _check_target(spec: TensorSpec, tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None or tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape or not tensor.is_contiguous():
        got = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ModelMismatch(f"{spec.name} is {spec.dtype} {list(spec.shape)}; for it {got} was given: give one like it")
    if tensor.device.type != "cpu":
        raise ModelMismatch(f"{spec.name} was given on {tensor.device}; versions are staged in host memory")
    return tensor


class TensorAssembler:
    """Whole tensors of one version, from the chunks of all sources. Chunks of different sources may come at once.

    They are assembled in `tensors` where these are given, which then hold nothing of use until `finish` returns them.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        regions: Mapping[int, Sequence[Region]],
        chunk_bytes: int,
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._dtypes = {spec.name: spec.dtype for spec in specs}
        self._regions = regions
        self._chunks = {rank: lay_out_chunks(rows, self._dtypes, chunk_bytes) for rank, rows in regions.items()}
        if tensors is None:
            tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
        self._tensors = {spec.name: _check_target(spec, tensors.get(spec.name)) for spec in specs}
        self._missing = {(rank, chunk.index) for rank, chunks in self._chunks.items() for chunk in chunks}
        self._left_elements = {spec.name: spec.numel for spec in specs}
        self._digests = {spec.name: 0 for spec in specs}
        self._lock = threading.Lock()
        self.num_bytes = 0

    @property
    def chunks(self) -> Mapping[int, Sequence[Chunk]]:
        """The layout of each source."""
        return self._chunks

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """(source rank, index) of the chunks that have not been taken."""
        return tuple(sorted(self._missing))

    def take(self, rank: int, index: int, _hash: bytes, buffer: Bytes) -> None:
        """Copy a chunk, whose hash was checked, to its places; a duplicate is ignored."""
        with self._lock:
            if (rank, index) not in self._missing:
                return
            self._missing.remove((rank, index))
            self.num_bytes += len(buffer)
        chunk = self._chunks[rank][index]
        for piece, data in zip(chunk.pieces, view_pieces(chunk, self._dtypes, buffer), strict=True):
            name = piece.region.name
            tensor = self._tensors[name]
            (tensor if data.shape == tensor.shape else tensor[piece.region.slices]).copy_(data)
            with self._lock:
                self._left_elements[name] -= data.numel()
                is_whole = not self._left_elements[name]
            if is_whole:  # of the tensor, not of the chunk: it vouches for what the engine gets
                self._digests[name] = region_digest(tensor, self._specs[name].whole())

    def finish(self, seals: Mapping[int, bytes]) -> dict[str, torch.Tensor]:
        """All tensors, in HF order. `seals` has each source's digests.

        Raises `WireError` when a chunk is missing, or a tensor does not have the digest that its sources computed.
        """
        if self._missing:
            rank, index = min(self._missing)
            raise WireError(
                f"{len(self._missing)} chunks came damaged or not at all, the first is chunk {index} of source rank "
                f"{rank}; the version is refused"
            )
        expected = self._add_digests(seals)
        for name, got in self._digests.items():
            if got != expected[name]:
                raise WireError(
                    f"tensor {name!r} has the digest {got:#x} after assembly, {expected[name]:#x} was announced by its "
                    "sources; the version is refused"
                )
        return self._tensors

    def _add_digests(self, seals: Mapping[int, bytes]) -> dict[str, int]:
        sums = dict.fromkeys(self._specs, 0)
        for rank, regions in self._regions.items():
            digests = np.frombuffer(seals[rank], "<u8") if len(seals[rank]) % 8 == 0 else np.empty(0, "<u8")
            if len(digests) != len(regions):
                raise WireError(
                    f"source rank {rank} gives {len(seals[rank])} bytes of digests for {len(regions)} regions"
                )
            for region, digest in zip(regions, digests.tolist(), strict=True):
                sums[region.name] = (sums[region.name] + digest) & MASK
        return sums
