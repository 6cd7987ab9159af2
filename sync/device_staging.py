"""Staging on a device: chunks land in the memory of an engine's GPU, and are digested where they landed.

    staging = make_staging(version, specs, layouts, shadow)     # on the shadow's device, or in host memory

Chunks that a source exposes on a GPU are copied from device to device, many in one pass (`device_passes`). One that
came over a connection is hashed on the host, as always, and copied up in one piece; a delta is checked on the host and
applied on the device.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.delta_format import ByteArray, Delta, ElementArray
from weightcast.sync.delta_torch import apply_on_device
from weightcast.sync.device_bits import aligned, view_on_device
from weightcast.sync.device_landing import LandingPasses
from weightcast.sync.device_passes import RunningPass
from weightcast.sync.digest_torch import as_digests, region_sum
from weightcast.sync.host_bytes import ChunkBytes, check_size, elements_of, writable
from weightcast.sync.host_pieces import HostPieces
from weightcast.sync.layout import SourceLayout
from weightcast.sync.ledger import ChunkKey
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.regions import TensorSpec
from weightcast.sync.run_staging import HostStaging, RunBytes, RunStaging
from weightcast.sync.scattered import ScatteredBytes
from weightcast.sync.shadow import Shadow
from weightcast.sync.staging import Staging
from weightcast.sync.version import Version


class DeviceStaging(RunStaging):
    """See the module. `land` waits for the device, so that a source may overwrite what was read of it."""

    run_kind = "cuda_ipc"
    _addresses: Int64Array | None = None

    def open_landing(self, rank: int, header: ChunkHeader, num_bytes: int, scratch: ByteArray) -> None:
        """Nowhere: what is received comes to host memory first."""

    def _owners(self, rank: int, first: int, count: int) -> tuple[list[int], list[int]]:
        return self._shadow.landings[rank].owners(first, count)

    def _land_dense(self, key: ChunkKey, chunk: Chunk, body: ChunkBytes | None) -> tuple[int, ...]:
        body = check_size(chunk, body)
        self._shadow.forget([key])
        came = body if isinstance(body, torch.Tensor) else torch.from_numpy(writable(body))
        return tuple(self._launch(*key, 1, came.to(self.device)).digests())

    def _launch(self, rank: int, first: int, count: int, came: RunBytes) -> RunningPass:
        """Bring the pieces of chunks whose bytes lie on the device to their places, and digest each."""
        assert not isinstance(came, np.ndarray | HostPieces)
        landing = self._shadow.landings.get(rank)
        if landing is None:
            assert self.device is not None
            strides = [self._tensors[spec.name].stride() for spec in self.specs]
            landing = LandingPasses(self.layouts[rank], self.specs, strides, self.device)
            self._shadow.landings[rank] = landing
        if self._addresses is None:
            self._addresses = np.fromiter(self._shadow.addresses.values(), np.int64, len(self.specs))
        span = landing.passes.span(first, count)
        starts = self.layouts[rank].start_bytes
        opened: dict[int, torch.Tensor] = {}

        def open_chunk(start: int, end: int) -> torch.Tensor:
            if isinstance(came, ScatteredBytes):
                return came.gather(start, end - start)
            return aligned(came[start - starts[first] : end - starts[first]])

        def find_source(number: int) -> torch.Tensor:
            index, piece = landing.pieces[span.start + number]
            if index not in opened:
                opened[index] = open_chunk(starts[index], starts[index + 1])
            return view_on_device(piece, self._tensors[piece.region.name].dtype, opened[index])

        def find_target(number: int) -> torch.Tensor:
            return self._target(landing.pieces[span.start + number][1])

        places = landing.places(first, count, came, self._addresses)
        return landing.passes.launch(first, count, places, find_source, find_target, (came,))

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
    return (HostStaging if shadow.device is None else DeviceStaging)(version, specs, layouts, shadow)
