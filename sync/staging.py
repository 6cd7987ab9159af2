"""The staging store: an engine's second copy of the weights, filled chunk by chunk, believed only when complete.

    staging = Staging(announce, specs, pool)
    staging.land(rank, index, buffer)          # checks the chunk, copies its pieces to their places
    tensors = staging.finish()                 # every tensor complete and its digest right, or WireError

Nothing here touches the network or the engine. Buffers come from a pool and return to it when nobody else holds
a tensor on them, so that a steady stream of versions reuses one copy's worth of memory.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from weightcast.sync.chunks import Chunk, check_chunk_bytes, lay_out_chunks
from weightcast.sync.digest import region_digest
from weightcast.sync.errors import ConfigError, SourceError, WireError
from weightcast.sync.messages import CHUNK_HASH_BYTES, Announce
from weightcast.sync.regions import Region, TensorSpec, find_tiling_fault
from weightcast.sync.snapshot import view_piece
from weightcast.sync.version import Manifest


class BufferPool:
    """Host buffers by tensor name, reused once no tensor lies on them any more."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}
        # A tensor keeps the array that it was made of alive, and so do its views: a dead lease means free memory.
        self._leases: dict[str, weakref.ref[npt.NDArray[np.uint8]]] = {}

    def take(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor for `spec` with undefined contents, on memory that nobody else looks at."""
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        buffer = self._buffers.get(spec.name)
        if buffer is None or len(buffer) != spec.num_bytes or self._leases[spec.name]() is not None:
            self._buffers[spec.name] = buffer = np.empty(spec.num_bytes, np.uint8)
        lease = buffer.view()
        self._leases[spec.name] = weakref.ref(lease)
        return torch.from_numpy(lease).view(spec.dtype).view(spec.shape)


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """What one source serves of a version: where to ask for it, and what each chunk must be."""

    rank: int
    address: str
    chunks: tuple[Chunk, ...]
    hashes: bytes

    def expected_hash(self, index: int) -> bytes:
        """The xxh3-128 of chunk `index`."""
        return self.hashes[index * CHUNK_HASH_BYTES : (index + 1) * CHUNK_HASH_BYTES]


def read_announce(announce: Announce, specs: Sequence[TensorSpec]) -> tuple[Manifest, tuple[SourceLayout, ...]]:
    """The manifest and the layout of every source, or `WireError` when the announcement contradicts itself.

    Pure, and complete before a byte of tensor memory is taken: the regions offered must tile every tensor exactly,
    and there must be a hash for each chunk and a digest for each tensor.
    """
    if len(announce.digests) != 8 * len(specs):
        raise WireError(
            f"version {announce.version} carries {len(announce.digests) // 8} digests for {len(specs)} tensors"
        )
    digests = tuple(int(d) for d in np.frombuffer(announce.digests, "<u8"))
    _check_regions(announce, specs)
    try:
        check_chunk_bytes(announce.chunk_bytes)
    except ConfigError as error:
        raise WireError(f"version {announce.version}: {error}") from None
    dtypes = {spec.name: spec.dtype for spec in specs}
    layouts = []
    for offer in announce.offers:
        # Before the layout is made, whose cost grows with what the regions claim to be.
        claimed_bytes = sum(region.numel * dtypes[region.name].itemsize for region in offer.regions)
        if claimed_bytes > len(offer.hashes) // CHUNK_HASH_BYTES * announce.chunk_bytes:
            raise WireError(
                f"version {announce.version}: source rank {offer.rank} offers {claimed_bytes} bytes, "
                f"too many for its {len(offer.hashes) // CHUNK_HASH_BYTES} chunks of {announce.chunk_bytes}"
            )
        chunks = lay_out_chunks(offer.regions, dtypes, announce.chunk_bytes)
        if len(offer.hashes) != len(chunks) * CHUNK_HASH_BYTES:
            raise WireError(
                f"version {announce.version}: source rank {offer.rank} gives "
                f"{len(offer.hashes) // CHUNK_HASH_BYTES} hashes for {len(chunks)} chunks"
            )
        layouts.append(SourceLayout(offer.rank, offer.address, chunks, offer.hashes))
    return Manifest(announce.version, tuple(specs), digests), tuple(layouts)


def _check_regions(announce: Announce, specs: Sequence[TensorSpec]) -> None:
    by_name: dict[str, list[Region]] = {spec.name: [] for spec in specs}
    if len(by_name) != len(specs):
        raise WireError(f"version {announce.version}: the publisher lists a tensor name twice")
    ranks = [offer.rank for offer in announce.offers]
    if len(set(ranks)) != len(ranks):
        raise WireError(f"version {announce.version} lists a source rank twice: {sorted(ranks)}")
    for offer in announce.offers:
        for region in offer.regions:
            if region.name not in by_name:
                raise WireError(f"version {announce.version}: {region} is no tensor of the model")
            by_name[region.name].append(region)
    for spec in specs:
        if fault := find_tiling_fault(spec, by_name[spec.name]):
            raise WireError(f"version {announce.version} is incomplete: {spec.name}: {fault}")


class Staging:
    """One version on its way in."""

    def __init__(self, manifest: Manifest, layouts: Sequence[SourceLayout], pool: BufferPool) -> None:
        self.manifest = manifest
        self.layouts: Mapping[int, SourceLayout] = {layout.rank: layout for layout in layouts}
        self.num_bytes = 0
        self.checksums_checked = 0
        self._missing = {(layout.rank, chunk.index) for layout in layouts for chunk in layout.chunks}
        self._tensors = {spec.name: pool.take(spec) for spec in manifest.specs}
        self._left_elements = {spec.name: spec.numel for spec in manifest.specs}
        self._specs = {spec.name: (spec, digest) for spec, digest in zip(manifest.specs, manifest.digests, strict=True)}
        for spec in manifest.specs:
            if not spec.numel:
                self._check_digest(spec.name)

    @property
    def num_missing(self) -> int:
        """Chunks that have not landed."""
        return len(self._missing)

    def is_missing(self, rank: int, index: int) -> bool:
        """Whether this chunk is still wanted; duplicates are not."""
        return (rank, index) in self._missing

    def land(self, rank: int, index: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Check a chunk and copy its pieces to their places; a duplicate is ignored.

        Raises `WireError` when its size or hash is wrong (then nothing was copied), or when it completes a tensor
        whose digest is wrong.
        """
        if not self.is_missing(rank, index):
            return
        layout = self.layouts[rank]
        chunk = layout.chunks[index]
        names = ", ".join(dict.fromkeys(piece.region.name for piece in chunk.pieces[:3]))
        where = f"chunk {index} of version {self.manifest.version} from source rank {rank} ({names}, ...)"
        if len(buffer) != chunk.num_bytes:
            raise WireError(f"{where} has {len(buffer)} bytes, {chunk.num_bytes} were announced; it is not used")
        if xxhash.xxh3_128_digest(buffer.data) != layout.expected_hash(index):
            raise WireError(f"{where} does not have the hash that was announced: its bytes were altered; not used")
        self.checksums_checked += 1
        self._missing.remove((rank, index))
        self.num_bytes += chunk.num_bytes
        for piece in chunk.pieces:
            name = piece.region.name
            self._tensors[name][piece.region.slices].copy_(view_piece(piece, self._specs[name][0].dtype, buffer))
            self._left_elements[name] -= piece.region.numel
            if not self._left_elements[name]:
                self._check_digest(name)

    def _check_digest(self, name: str) -> None:
        """The digest is taken of the assembled tensor, not of the chunks: it vouches for what the engine gets."""
        spec, digest = self._specs[name]
        got = region_digest(self._tensors[name], spec.whole())
        if got != digest:
            raise WireError(
                f"tensor {name!r} of version {self.manifest.version} has the digest {got:#x} after assembly, "
                f"{digest:#x} was announced; the version is refused"
            )
        self.checksums_checked += 1

    def finish(self) -> dict[str, torch.Tensor]:
        """All tensors, in HF order. `SourceError` when a chunk is missing."""
        if self._missing:
            rank, index = min(self._missing)
            raise SourceError(
                f"version {self.manifest.version} is incomplete: {len(self._missing)} chunks are missing, "
                f"the first is chunk {index} of source rank {rank}"
            )
        assert not any(self._left_elements.values())
        tensors, self._tensors = self._tensors, {}
        return tensors
