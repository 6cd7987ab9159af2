"""The shadow: the staged copy of the model that a receiver keeps between versions.

It is no engine's memory: an engine loads from it. So a version may be written over the one before while the engine
serves, and a delta is applied where the old bits lie. The shadow knows of which version the bits of each chunk are.

    tensors = shadow.open(layouts, specs)      # memory for the next version, with the last one's bits where possible
    shadow.base(rank, index)                   # Version, or None: nothing that a delta could begin from

`in_place` has the exception: a shadow that is the engine's memory.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.device_landing import LandingPasses
from weightcast.sync.device_pool import DevicePool
from weightcast.sync.host_landing import HostLanding
from weightcast.sync.layout import SourceLayout
from weightcast.sync.ledger import ChunkKey, LedgerPlan
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version
from weightcast.sync.wanted import BoxSpec


class TensorPool(Protocol):
    """Where a shadow's tensors lie."""

    def take(self, spec: TensorSpec, *, keep_bits: bool = False) -> torch.Tensor:
        """A tensor to be written. With `keep_bits` it has those of the tensor of this name that was taken before."""
        ...


@dataclass(frozen=True, slots=True)
class Carried:
    """What of a staged copy is still there when it goes on in other memory, for other boxes."""

    chunks: frozenset[ChunkKey]
    """All that is kept of them from now on was kept before."""
    rests: frozenset[tuple[ChunkKey, int]]
    """Pieces, by chunk and number, of which the same is left out as before."""


# What numpy gives begins 16 bytes after a page: every vector of a copy from elsewhere would then lie on two lines.
_ALIGNMENT_BYTES = 64


def _allocate(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory of undefined contents that begins on a cache line."""
    raw = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + num_bytes]


class BufferPool:
    """Host buffers by tensor name, reused once no tensor lies on them any more."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}
        # A tensor keeps the array that it was made of alive, and so do its views: a dead lease means free memory.
        self._leases: dict[str, weakref.ref[npt.NDArray[np.uint8]]] = {}

    def take(self, spec: TensorSpec, *, keep_bits: bool = False) -> torch.Tensor:
        """A tensor for `spec` on memory that nobody else looks at.

        Its contents are undefined, or, with `keep_bits`, those of the tensor of this name that was taken before.
        """
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        room_bytes, start = (spec.room_bytes, spec.start_byte) if isinstance(spec, BoxSpec) else (spec.num_bytes, 0)
        place = slice(start, start + spec.num_bytes)
        buffer = self._buffers.get(spec.name)
        if buffer is None or len(buffer) != room_bytes or self._leases[spec.name]() is not None:
            fresh = _allocate(room_bytes)
            if keep_bits and buffer is not None:
                fresh[place] = buffer[place]
            self._buffers[spec.name] = buffer = fresh
        lease = buffer.view()
        self._leases[spec.name] = weakref.ref(lease)
        return torch.from_numpy(lease)[place].view(spec.dtype).view(spec.shape)


class Shadow:
    """See the module. `pool` is where the tensors lie (by default private memory), `whole` the version that it has.

    With `device` they lie on that device, in memory of the shadow's own.
    """

    def __init__(
        self, pool: TensorPool | None = None, whole: Version | None = None, device: torch.device | None = None
    ) -> None:
        own: BufferPool | DevicePool = BufferPool() if device is None else DevicePool(device)
        self._pool: TensorPool = own if pool is None else pool
        self.device = own.device if isinstance(own, DevicePool) else None
        self._whole = whole
        self._specs: Sequence[TensorSpec] = ()
        self._layouts: Mapping[int, SourceLayout] = {}
        self._versions: dict[ChunkKey, Version] = {}
        self.rests: dict[tuple[ChunkKey, int], list[torch.Tensor]] = {}
        """What no engine takes of a piece of a chunk, kept so that a delta can be applied to all of it."""
        self.keeps_rests = False
        self.reads_all = False
        """Whether all sources' memory on a device is read: bits that an engine still holds are then read anew."""
        self.addresses: dict[str, int] = {}
        """Of the tensors that were opened last, in order."""
        self.ledger_plan: LedgerPlan | None = None
        """What is counted of a version of this layout; made by whoever stages the first."""
        self.landings: dict[int, LandingPasses] = {}
        """By source rank, how chunks come to tensors on a device."""
        self.host_landings: dict[int, HostLanding] = {}
        """The same for tensors of the host."""

    def open(self, layouts: Mapping[int, SourceLayout], specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
        """The model's tensors, in HF order.

        Where an engine still holds one, its bits are copied to other memory; with `reads_all` they are forgotten.
        """
        if layouts != self._layouts or specs != self._specs:
            # The same index now means other bytes.
            self._versions.clear()
            self.rests.clear()
            self.landings.clear()
            self.host_landings.clear()
            self.ledger_plan = None
            self._layouts, self._specs = layouts, specs
        if self._whole is not None:
            for layout in layouts.values():
                for chunk in layout.chunks:
                    self.note((layout.rank, chunk.index), self._whole)
            self._whole = None
        keeps_bits = bool(self._versions) and not self.reads_all
        tensors = {spec.name: self._pool.take(spec, keep_bits=keeps_bits) for spec in specs}
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        if not keeps_bits and addresses != self.addresses:
            self._versions.clear()
            self.rests.clear()
        self.addresses = addresses
        return tensors

    def moved(
        self,
        pool: TensorPool,
        layouts: Mapping[int, SourceLayout],
        specs: Sequence[TensorSpec],
        carried: Carried,
    ) -> "Shadow":
        """The shadow of other memory, on the host, which has what was carried there of this one, and nothing else."""
        after = Shadow(pool)
        after._layouts, after._specs, after.keeps_rests = layouts, specs, self.keeps_rests
        if self._whole is not None or layouts == self._layouts:
            for key in carried.chunks:
                if (version := self._whole or self._versions.get(key)) is not None:
                    after.note(key, version)
            after.rests = {piece: self.rests[piece] for piece in carried.rests & self.rests.keys()}
        return after

    def describe_engine(self, serving: Version | None) -> str:
        """What an engine does when a version does not come; what is staged apart from it harms nothing."""
        return f"goes on serving version {serving}" if serving is not None else "keeps the weights it has"

    def base(self, key: ChunkKey) -> Version | None:
        """The version whose bits a chunk's pieces have."""
        return self._versions.get(key)

    def forget(self, keys: Iterable[ChunkKey]) -> None:
        """These chunks' bits are no version's: they are being written, or proved wrong."""
        for key in keys:
            self._versions.pop(key, None)

    def note(self, key: ChunkKey, version: Version) -> None:
        """A chunk's pieces have the bits of `version` now."""
        self._versions[key] = version

    def note_all(self, keys: Iterable[ChunkKey], version: Version) -> None:
        """So have the pieces of many chunks."""
        self._versions.update(dict.fromkeys(keys, version))
