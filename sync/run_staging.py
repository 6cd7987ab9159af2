"""Staging of runs: whole chunks, neighbours in memory that an engine reads, are brought to their places at once.

    staging.begin_run(rank, header, there)       # a landing of all chunks that a header stands for, or None
    staging.land(rank, header, landing)          # as any body

In host memory one call copies and digests them (`host_landing`); `device_staging` has the one of a device.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_landing import RunLanding, RunningRun
from weightcast.sync.host_landing import HostLanding
from weightcast.sync.host_passes import has_passes
from weightcast.sync.host_pieces import HostPieces
from weightcast.sync.landing import Body
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.scattered import ScatteredBytes
from weightcast.sync.staging import Staging

RunBytes: TypeAlias = ByteArray | HostPieces | torch.Tensor | ScatteredBytes
"""What a run is read from: its bytes, or all of a source's where they lie here and there; in host memory, or not."""


class RunStaging(Staging, ABC):
    """See the module."""

    def land(self, rank: int, header: ChunkHeader, body: Body | None, *, is_hashed: bool = True) -> None:
        """See `Staging`; also for a run that was begun, of chunks that are all missing."""
        if not isinstance(body, RunLanding):
            super().land(rank, header, body, is_hashed=is_hashed)
            return
        assert body.owner is self and not is_hashed and header.encoding == "dense"
        keys = [(rank, index) for index in range(header.index, header.index + header.count)]
        firsts, owners = self._owners(rank, header.index, header.count)
        digests = body.running.digests()
        self._shadow.note_all(keys, self.version)
        self._ledger.add(keys, firsts, owners, digests)
        self.num_bytes += len(body)

    def begin_run(self, rank: int, header: ChunkHeader, there: RunBytes) -> RunLanding | None:
        """Begin to copy whole chunks, all missing, to their places; None where these must come one by one.

        `there` are their bytes where a source has them: together, or found among all of the source's where those lie
        here and there. What is returned is landed as any body is; others may be begun before, none of the same chunks.
        """
        keys = [(rank, index) for index in range(header.index, header.index + header.count)]
        assert self._ledger.missing.issuperset(keys)
        if not self._takes(rank, header.index, header.count, there):
            return None
        self._shadow.forget(keys)
        starts = self.layouts[rank].start_bytes
        num_bytes = starts[header.index + header.count] - starts[header.index]
        return RunLanding(self, self._launch(rank, header.index, header.count, there), num_bytes)

    def _takes(self, rank: int, first: int, count: int, there: RunBytes) -> bool:
        """Whether these chunks may be landed at once."""
        return True

    @abstractmethod
    def _launch(self, rank: int, first: int, count: int, came: RunBytes) -> RunningRun:
        """Bring the pieces of chunks to their places."""

    @abstractmethod
    def _owners(self, rank: int, first: int, count: int) -> tuple[list[int], list[int]]:
        """Of a run that was begun: where each chunk's pieces begin among its own, and each one's tensor."""


@dataclass(frozen=True, slots=True)
class _Done:
    found: list[int]
    is_done = True

    def digests(self) -> list[int]:
        return self.found

    def wait(self) -> None:
        pass


class HostStaging(RunStaging):
    """In host memory, of chunks in a source's shared memory."""

    run_kind = "shared_memory"
    _addresses: Int64Array | None = None

    def _takes(self, rank: int, first: int, count: int, there: RunBytes) -> bool:
        return has_passes() and self._open_landing(rank, there).takes(first, count)

    def _launch(self, rank: int, first: int, count: int, came: RunBytes) -> RunningRun:
        assert isinstance(came, np.ndarray | HostPieces)
        if self._addresses is None:
            self._addresses = np.array([tensor.data_ptr() for tensor in self._tensors.values()], np.int64)
        return _Done(self._open_landing(rank, came).run(first, count, came, self._addresses))

    def _owners(self, rank: int, first: int, count: int) -> tuple[list[int], list[int]]:
        return self._shadow.host_landings[rank].owners(first, count)

    def _open_landing(self, rank: int, there: RunBytes) -> HostLanding:
        scattered = there if isinstance(there, HostPieces) else None
        landing = self._shadow.host_landings.get(rank)
        if landing is None or not landing.is_of(scattered):
            landing = HostLanding(self.layouts[rank], self._tensors, scattered)
            self._shadow.host_landings[rank] = landing
        return landing
