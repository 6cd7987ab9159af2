"""A model in one arena: writable tensors for the worker that receives it, read-only ones for the others of its host.

    pool = SharedPool.create(specs)                         # the receiver; pool.take(spec) as of a BufferPool
    pool = SharedPool.attach(specs, descriptor, timeout_s)  # another worker

The first page says what lies behind it: a version, or a state that is being overwritten. It is in the memory itself,
so a reader can always tell whether what it has read was left alone meanwhile, also when the writer is dead.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.errors import ConfigError, VersionError
from weightcast.sync.host.arena import Arena, as_tensor, map_arena
from weightcast.sync.part_plan import box_key, list_staged_specs
from weightcast.sync.piece_views import slices_within
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.union import find_shares
from weightcast.sync.version import Version
from weightcast.sync.wanted import WantedRegions

# Tensors begin at multiples of this: a cache line, and more than any dtype needs.
ALIGNMENT_BYTES = 64
_HEADER_BYTES = 4096
# Words of 8 bytes in the header: the state, even when a version is staged and odd while it is overwritten, and one
# higher with each change; then the version.
_STATE, _EPOCH, _NUMBER = 0, 1, 2
_EMPTY = 0
# How long the owner's second mapping may take before its pages come one by one.
_OWN_MAPPING_S = 10.0


@dataclass(frozen=True, slots=True)
class Staged:
    """What an arena holds: `version`, in the state `state` of the arena, which no later content has again."""

    version: Version
    state: int


def lay_out_pool(specs: Iterable[TensorSpec]) -> tuple[dict[str, int], int]:
    """Where each tensor of a model begins in its arena, and how many bytes that has. The order of specs is no matter.

    Raises `ConfigError` when a name is there twice.
    """
    starts: dict[str, int] = {}
    used = _HEADER_BYTES
    for spec in sorted(specs, key=lambda spec: spec.name):
        if spec.name in starts:
            raise ConfigError(f"the tensor {spec.name!r} is listed twice; a model has each name once")
        starts[spec.name] = used
        used += -(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return starts, used


class SharedPool:
    """The tensors of a model, or boxes of them, on shared memory. `tensors` has them by name, in the specs' order.

    Those of an attached pool must not be written: the process would end with SIGSEGV. Copy from them, or `clone()`.
    `wanted` says which boxes the specs are (`part_plan.list_kept_specs`), where they are not the model's tensors.
    """

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        memory: npt.NDArray[np.uint8],
        arena: Arena | None,
        wanted: WantedRegions | None = None,
    ) -> None:
        self.wanted = wanted
        self._specs = {spec.name: spec for spec in specs}
        self._memory = memory
        self._arena = arena
        self._header = memory[:_HEADER_BYTES].view(np.uint64)
        starts, _ = lay_out_pool(self._specs.values())
        raw = as_tensor(memory)
        self.tensors: Mapping[str, torch.Tensor] = {
            spec.name: raw[starts[spec.name] :][: spec.num_bytes].view(spec.dtype).view(spec.shape)
            for spec in self._specs.values()
        }

    @classmethod
    def create(cls, specs: Iterable[TensorSpec], wanted: WantedRegions | None = None) -> "SharedPool":
        """A pool of one's own, zeroed. `StorageError` when there is too little memory."""
        specs = tuple(specs)
        arena = Arena(lay_out_pool(specs)[1])
        return cls(specs, arena.memory, arena, wanted)

    @classmethod
    def attach(
        cls, specs: Iterable[TensorSpec], descriptor: int, timeout_s: float, wanted: WantedRegions | None = None
    ) -> "SharedPool":
        """The pool of another worker for the same specs. `ReachError` when the memory does not fit them."""
        specs = tuple(specs)
        return cls(specs, map_arena(descriptor, lay_out_pool(specs)[1], timeout_s), None, wanted)

    @property
    def is_writable(self) -> bool:
        """Whether this process made the pool."""
        return self._arena is not None

    @property
    def num_bytes(self) -> int:
        """The size of the arena, its first page included."""
        return len(self._memory)

    @property
    def descriptor(self) -> int:
        """What another worker attaches to; only of a pool of one's own."""
        assert self._arena is not None
        return self._arena.descriptor

    def map_again(self) -> "SharedPool":
        """The same memory, read-only, in the process that made it."""
        memory = map_arena(self.descriptor, self.num_bytes, _OWN_MAPPING_S)
        return SharedPool(self._specs.values(), memory, None, self.wanted)

    @property
    def is_open(self) -> bool:
        """Whether it is between `begin` and `finish`."""
        return int(self._header[_STATE]) % 2 == 1

    def take(self, spec: TensorSpec, *, keep_bits: bool = True) -> torch.Tensor:
        """The place of a tensor, with what lies there, to be written: its owner may between `begin` and `finish`."""
        assert self.is_writable and self.staged() is None, "a staged version is overwritten only after begin()"
        if self._specs.get(spec.name) != spec:
            raise ConfigError(f"the shared copy was made for {self._specs.get(spec.name)}, not for {spec}")
        return self.tensors[spec.name]

    def staged(self) -> Staged | None:
        """The version that lies here, whole, or None."""
        state = int(self._header[_STATE])
        version = Version(int(self._header[_EPOCH]), int(self._header[_NUMBER]))
        if state == _EMPTY or state % 2 or int(self._header[_STATE]) != state:
            return None
        return Staged(version, state)

    def is_unchanged(self, staged: Staged) -> bool:
        """Whether what was read as `staged` was left alone meanwhile."""
        return int(self._header[_STATE]) == staged.state

    def check_unchanged(self, staged: Staged) -> None:
        """`VersionError` when what was read as `staged` may have been overwritten meanwhile."""
        if not self.is_unchanged(staged):
            raise VersionError(
                f"version {staged.version} was overwritten while it was read: the lease was kept for too long; "
                "load the next version, and ask for longer leases where loading takes longer"
            )

    def begin(self) -> None:
        """From now on the contents are undefined, until `finish`."""
        assert self.is_writable
        if not self.is_open:
            self._header[_STATE] += 1

    def finish(self, version: Version) -> Staged:
        """The contents are `version` from now on."""
        assert self.is_writable and self.is_open, "finish() comes after begin()"
        self._header[_EPOCH], self._header[_NUMBER] = version.epoch, version.number
        self._header[_STATE] += 1
        return Staged(version, int(self._header[_STATE]))

    def copy_from(self, other: "SharedPool") -> None:
        """All tensors of `other`, a pool for the same specs, between `begin` and `finish`."""
        assert self.is_writable and len(other._memory) == len(self._memory)
        self._memory[_HEADER_BYTES:] = other._memory[_HEADER_BYTES:]

    def follow_on(self, other: "SharedPool", specs: Iterable[TensorSpec]) -> None:
        """Take the place of `other`, a pool for other boxes of the model's tensors `specs`: with all bits that both
        have, and states that it never had. Nothing is staged then."""
        assert self.is_writable and int(self._header[_STATE]) == _EMPTY
        for spec in specs:
            ours, theirs = self._list_boxes(spec), other._list_boxes(spec)
            for box, tensor in ours.items():
                for common, around in find_shares(box, theirs):
                    tensor[slices_within(common, box)] = theirs[around][slices_within(common, around)]
        self._header[_STATE] = int(other._header[_STATE]) | 1

    def _list_boxes(self, spec: TensorSpec) -> dict[Region, torch.Tensor]:
        """What lies here of a tensor of the model."""
        if self.wanted is None:
            return {spec.whole(): self.tensors[spec.name]}
        return {box: self.tensors[box_key(box)] for box in self.wanted[spec.name]}

    def close(self) -> None:
        """Nobody can attach any more. The memory goes with the last tensor on it, here and elsewhere."""
        if self._arena is not None:
            self._arena.close()


def make_pool(
    specs: tuple[TensorSpec, ...], wanted: WantedRegions | None, before: SharedPool | None = None
) -> SharedPool:
    """A pool for these boxes of a model, None for all of it, in the place of one `before`.

    `StorageError` when there is too little memory.
    """
    pool = SharedPool.create(list_staged_specs(specs, wanted), wanted)
    if before is not None:
        pool.follow_on(before, specs)
    return pool
