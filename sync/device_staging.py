"""Staging on a device: chunks land in the memory of an engine's GPU, and are digested where they landed.

    staging = make_staging(version, specs, layouts, shadow)     # on the shadow's device, or in host memory

A chunk that a source exposes on a GPU is copied from device to device. One that came over a connection is hashed on the
host, as always, and copied up in one piece; a delta is checked on the host and applied on the device.
"""

from collections.abc import Mapping, Sequence

import torch

from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.delta_format import ByteArray, Delta, ElementArray
from weightcast.sync.delta_torch import apply_on_device
from weightcast.sync.device_bits import aligned, view_on_device
from weightcast.sync.digest_torch import as_digests, region_sum
from weightcast.sync.host_bytes import ChunkBytes, check_size, elements_of, writable
from weightcast.sync.layout import SourceLayout
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.regions import TensorSpec
from weightcast.sync.shadow import ChunkKey, Shadow
from weightcast.sync.staging import Staging
from weightcast.sync.version import Version


class DeviceStaging(Staging):
    """See the module. Every method waits for the device, so that a source may overwrite what was read of it."""

    def open_landing(self, rank: int, header: ChunkHeader, num_bytes: int, scratch: ByteArray) -> None:
        """Nowhere: what is received comes to host memory first."""

    def _land_dense(self, key: ChunkKey, chunk: Chunk, body: ChunkBytes | None) -> tuple[int, ...]:
        body = check_size(chunk, body)
        self._shadow.forget([key])
        came = body if isinstance(body, torch.Tensor) else torch.from_numpy(writable(body))
        came = aligned(came.to(self.device))
        sums = []
        for piece in chunk.pieces:
            target = self._target(piece)
            target.copy_(view_on_device(piece, target.dtype, came))
            sums.append(region_sum(target, piece.region))
        return tuple(as_digests(sums))

    def _host_elements(self, flat: torch.Tensor) -> ElementArray:
        return elements_of(flat.cpu())

    def _apply(self, change: Delta, flat: torch.Tensor) -> None:
        apply_on_device(change, flat.view(-1))

    def _digest_all(self, flats: Sequence[torch.Tensor], pieces: Sequence[Piece]) -> tuple[int, ...]:
        return tuple(as_digests([region_sum(flat, piece.region) for flat, piece in zip(flats, pieces, strict=True)]))


def make_staging(
    version: Version, specs: Sequence[TensorSpec], layouts: Mapping[int, SourceLayout], shadow: Shadow
) -> Staging:
    """A staging of `version` where the shadow's tensors lie."""
    return (Staging if shadow.device is None else DeviceStaging)(version, specs, layouts, shadow)
