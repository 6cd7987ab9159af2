"""A source's copy of its share, in host memory: the bits of the last published version, and how deltas are found.

    copy = HostCopy(source, regions)
    for change in copy.pack(with_delta=True):     # brings the copy to the live weights, piece by piece
        ...                                       # what changed, encoded against what the copy held before

Memory: the share, one piece, and the deltas that the caller keeps. A piece is a run of whole rows of a region, so its
bytes lie together in the copy and, for a region that is a whole tensor, in the receiver's tensor as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightcast.sync.chunks import split_region
from weightcast.sync.delta_codec import as_elements, encode_delta
from weightcast.sync.delta_format import HEADER_BYTES, ByteArray, parse_delta
from weightcast.sync.delta_wire import pack_delta
from weightcast.sync.digest import region_digest
from weightcast.sync.disk.records import Encoding
from weightcast.sync.disk.tensor_files import Buffer
from weightcast.sync.errors import SourceError
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.source import WeightSource

PIECE_BYTES = 64 << 20
# A delta piece that takes more than this share of the dense bytes is stored dense: it is read and applied faster.
DELTA_MAX_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Change:
    """What a piece became. Dense data are a view of the copy: write them before the next `pack`."""

    piece: Region
    encoding: Encoding
    data: Buffer
    num_changed: int


class HostCopy:
    """See the module. `regions` are those that this source serves, each of which it holds."""

    def __init__(self, source: WeightSource, regions: Sequence[Region]) -> None:
        held = {item.region: item for item in source.held()}
        self.specs = {spec.name: spec for spec in source.specs()}
        self.regions = tuple(regions)
        self._held: tuple[HeldRegion, ...] = tuple(held[region] for region in regions)
        self._memory: tuple[ByteArray, ...] = tuple(
            np.empty(region.numel * self.specs[region.name].dtype.itemsize, np.uint8) for region in regions
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the share."""
        return sum(len(memory) for memory in self._memory)

    def is_whole(self, index: int) -> bool:
        """Whether region number `index` is a whole tensor."""
        region = self.regions[index]
        return region.shape == self.specs[region.name].shape

    def data(self, index: int) -> memoryview:
        """The bytes of region number `index`."""
        return self._memory[index].data.toreadonly()

    def digests(self) -> list[int]:
        """The digest of each region, as the copy has it now."""
        return [
            region_digest(_as_tensor(memory, self.specs[region.name], region.shape), region)
            for region, memory in zip(self.regions, self._memory, strict=True)
        ]

    def pack(self, *, with_delta: bool, entropy_code: bool = False) -> Iterator[Change]:
        """Bring the copy to the live weights; exhaust it, or the copy is of no version.

        With `with_delta`, each piece that changed is yielded, encoded against what the copy held. Raises
        `SourceError` when a live view no longer has its region's shape.
        """
        for held, memory in zip(self._held, self._memory, strict=True):
            region, spec = held.region, self.specs[held.region.name]
            live = held.live()
            if tuple(live.shape) != region.shape:
                raise SourceError(
                    f"the live view of {region} has the shape {tuple(live.shape)}; the model changed after its plan "
                    "was made: make the publisher after the model is wrapped"
                )
            start = 0
            for piece in split_region(region, PIECE_BYTES // spec.dtype.itemsize):
                rows = memory[start : start + piece.numel * spec.dtype.itemsize]
                start += len(rows)
                if change := _pack_piece(piece, region, live, spec, rows, with_delta, entropy_code):
                    yield change


def _pack_piece(
    piece: Region,
    region: Region,
    live: torch.Tensor,
    spec: TensorSpec,
    rows: ByteArray,
    with_delta: bool,
    entropy_code: bool,
) -> Change | None:
    local = tuple(
        slice(start - base, start - base + size)
        for start, base, size in zip(piece.offset, region.offset, piece.shape, strict=True)
    )
    if not with_delta:
        _as_tensor(rows, spec, piece.shape).copy_(live[local])
        return None
    now = np.empty_like(rows)
    _as_tensor(now, spec, piece.shape).copy_(live[local])
    base, new = as_elements(rows, spec.dtype.itemsize), as_elements(now, spec.dtype.itemsize)
    payload = encode_delta(base, new, max(HEADER_BYTES, int(DELTA_MAX_SHARE * len(rows))))
    if payload is None:
        num_changed = int(np.count_nonzero(base != new))
        rows[:] = now
        return Change(piece, "dense", rows.data.toreadonly(), num_changed)
    if len(payload) == HEADER_BYTES:
        return None
    num_changed = parse_delta(payload, spec.dtype.itemsize, len(new)).num_changes
    coded = pack_delta(payload, base) if entropy_code else payload
    rows[:] = now
    # Entropy coding a delta of a few elements makes it longer.
    if len(coded) < len(payload):
        return Change(piece, "zdelta", coded, num_changed)
    return Change(piece, "delta", payload, num_changed)


def _as_tensor(raw: ByteArray, spec: TensorSpec, shape: tuple[int, ...]) -> torch.Tensor:
    if not len(raw):
        return torch.empty(shape, dtype=spec.dtype)
    return torch.from_numpy(raw).view(spec.dtype).view(shape)
