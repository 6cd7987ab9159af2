"""What the two ends of a broadcast by itself need: chunks from live regions, and tensors from chunks.

`RegionPacker` copies a source's regions chunk by chunk, straight into a bucket, and digests them on the way;
`TensorAssembler` puts chunks of several sources into whole tensors and believes them when their digests add up. Neither
holds more of a model than the tensors themselves. A model of experts has tens of thousands of pieces, so where each
lies is worked out once a layout, not once a version.

A tensor's digest is the sum of what the sources say of their regions: see `weightcast.sync.digest`.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from weightcast.sync.chunks import Chunk
from weightcast.sync.digest import MASK, bytes_digest
from weightcast.sync.errors import ModelMismatch, SourceError, WireError
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.transports.collective_layout import CollectiveLayout

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies in its chunk (bytes `start` to `end`), and in region number `owner` that it was cut from."""

    start: int
    end: int
    first_element: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    piece: Region
    owner: int
    local: tuple[slice, ...] | None  # None for a whole region


def place_pieces(
    chunks: Sequence[Chunk], regions: Sequence[Region], dtypes: Mapping[str, torch.dtype]
) -> list[list[Place]]:
    """For each chunk the places of its pieces. Pieces come in the order of `regions`, which they were cut from."""
    owners = [number for number, region in enumerate(regions) if region.numel]
    at, left_elements = -1, 0
    table: list[list[Place]] = []
    for chunk in chunks:
        row: list[Place] = []
        for piece in chunk.pieces:
            if not left_elements:
                at += 1
                left_elements = regions[owners[at]].numel
            left_elements -= piece.region.numel
            region, dtype = regions[owners[at]], dtypes[piece.region.name]
            local = None if piece.region.shape == region.shape else _local(piece.region, region)
            start = piece.start_byte
            place = (start, start + piece.num_bytes, start // dtype.itemsize, _strides(piece.region.shape), dtype)
            row.append(Place(*place, piece.region, owners[at], local))
        table.append(row)
    return table


def _local(piece: Region, region: Region) -> tuple[slice, ...]:
    """Where a piece lies inside the region that it was cut from."""
    return tuple(
        slice(start - base, start - base + size)
        for start, base, size in zip(piece.offset, region.offset, piece.shape, strict=True)
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class _Views:
    """Views of a chunk's bytes as elements; one reinterpretation a dtype, then one view a piece."""

    def __init__(self, buffer: Bytes) -> None:
        self._raw = torch.from_numpy(buffer)
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def find(self, place: Place) -> torch.Tensor:
        """The piece's place, as a tensor of the piece's shape."""
        typed = self._typed.get(place.dtype)
        if typed is None:
            end = len(self._raw) // place.dtype.itemsize * place.dtype.itemsize
            typed = self._typed[place.dtype] = self._raw[:end].view(place.dtype)
        return typed.as_strided(place.piece.shape, place.strides, place.first_element)


class RegionPacker:
    """Packs versions of a source's regions: `begin`, then `pack` for chunk 0, 1, ... in order, then `digests`."""

    def __init__(
        self,
        regions: Sequence[Region],
        held: Sequence[HeldRegion],
        dtypes: Mapping[str, torch.dtype],
        chunks: Sequence[Chunk],
    ) -> None:
        by_region = {one.region: one for one in held}
        self._regions = regions
        self._held = [by_region[region] for region in regions]
        self._table = place_pieces(chunks, regions, dtypes)
        self._digests = [0] * len(regions)
        self._owner = -1
        self._live = torch.empty(0)

    def begin(self) -> None:
        """The next version starts: live views are taken anew."""
        self._digests = [0] * len(self._regions)
        self._owner = -1

    def pack(self, index: int, into: Bytes) -> bytes:
        """Fill `into` with a chunk and return its xxh3-128. `SourceError` when a live view changed its shape."""
        views = _Views(into)
        end = 0
        for place in self._table[index]:
            if place.start != end:
                into[end : place.start] = 0  # gaps hold what the buffer had before
            end = place.end
            if place.owner != self._owner:
                self._take_live(place.owner)
            views.find(place).copy_(self._live if place.local is None else self._live[place.local])
            self._digests[place.owner] += bytes_digest(into[place.start : end], place.piece, place.dtype.itemsize)
        return xxhash.xxh3_128_digest(into.data)

    def _take_live(self, owner: int) -> None:
        region = self._regions[owner]
        self._owner, self._live = owner, self._held[owner].live()
        if tuple(self._live.shape) != region.shape:
            raise SourceError(
                f"the live view of {region} has the shape {tuple(self._live.shape)}; "
                "the model changed after its plan was made: make the source after the model is wrapped"
            )

    def digests(self) -> bytes:
        """8 bytes a region, little-endian, in the order of the regions; for use when all chunks are packed."""
        return np.array([digest & MASK for digest in self._digests], "<u8").tobytes()


def _check_target(spec: TensorSpec, tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None or tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape or not tensor.is_contiguous():
        got = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ModelMismatch(f"{spec.name} is {spec.dtype} {list(spec.shape)}; for it {got} was given: give one like it")
    if tensor.device.type != "cpu":
        raise ModelMismatch(f"{spec.name} was given on {tensor.device}; versions are staged in host memory")
    return tensor


class TensorAssembler:
    """Whole tensors of one version after the other, from the chunks of all sources, which may come at once.

    `begin`, then `take` for each chunk, then `finish`. Tensors are assembled in `into` where it is given, which then
    hold nothing of use until `finish` returns them.
    """

    def __init__(self, layout: CollectiveLayout) -> None:
        self._layout = layout
        self._specs = {spec.name: spec for spec in layout.specs}
        self._wholes = {spec.name: spec.whole() for spec in layout.specs}
        self._tables = {
            rank: place_pieces(chunks, layout.regions[rank], layout.dtypes) for rank, chunks in layout.chunks.items()
        }
        self._tensors: dict[str, torch.Tensor] = {}
        self._missing: set[tuple[int, int]] = set()
        self._left_elements: dict[str, int] = {}
        self._digests: dict[str, int] = {}
        self._lock = threading.Lock()
        self.num_bytes = 0

    def begin(self, into: dict[str, torch.Tensor] | None = None) -> None:
        """The next version starts. Raises `ModelMismatch` when a tensor of `into` is not as the model's."""
        if into is None:
            into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in self._specs.items()}
        self._tensors = {name: _check_target(spec, into.get(name)) for name, spec in self._specs.items()}
        self._missing = {(rank, chunk.index) for rank, chunks in self._layout.chunks.items() for chunk in chunks}
        self._left_elements = {name: whole.numel for name, whole in self._wholes.items()}
        self._digests = dict.fromkeys(self._specs, 0)
        self.num_bytes = 0

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
        views = _Views(buffer)
        for place in self._tables[rank][index]:
            name, piece = place.piece.name, place.piece
            tensor, whole = self._tensors[name], self._wholes[name]
            (tensor if piece.shape == whole.shape else tensor[piece.slices]).copy_(views.find(place))
            with self._lock:
                self._left_elements[name] -= (place.end - place.start) // place.dtype.itemsize
                is_whole = not self._left_elements[name]
            if is_whole:  # of the tensor, not of the chunk: it vouches for what the engine gets
                raw = tensor.reshape(-1).view(torch.uint8).numpy()
                self._digests[name] = bytes_digest(raw, whole, place.dtype.itemsize)

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
        tensors, self._tensors = self._tensors, {}
        return tensors

    def _add_digests(self, seals: Mapping[int, bytes]) -> dict[str, int]:
        sums = dict.fromkeys(self._specs, 0)
        for rank, regions in self._layout.regions.items():
            digests = np.frombuffer(seals[rank], "<u8") if len(seals[rank]) % 8 == 0 else np.empty(0, "<u8")
            if len(digests) != len(regions):
                raise WireError(
                    f"source rank {rank} gives {len(seals[rank])} bytes of digests for {len(regions)} regions"
                )
            for region, digest in zip(regions, digests.tolist(), strict=True):
                sums[region.name] += digest
        return {name: total & MASK for name, total in sums.items()}
