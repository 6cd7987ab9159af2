"""What packers that pack nothing have in common: `live_packer` on a GPU, `host_live` in host memory.

packer.look()                           # where the weights lie just now; ReachError when nothing can be done there
packer.tickets                          # for the announcement
snapshot = packer.begin(version, "off") # chunks are ready at once; the rest as with `Packer`

The weights must stay as they are until the fleet serves the version. A chunk's bits on the host are copied together
when somebody wants to be sent them, and are stale from one version to the next.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from weightcast.sync.chunks import Chunk
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.live_chunks import LiveChunkState, LiveSnapshot
from weightcast.sync.packer import Packer, PackMode, cut_arena
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.version import Version


class Exposed(Protocol):
    """A way to the weights, which engines take with its ticket."""

    @property
    def kind(self) -> str: ...

    @property
    def ticket(self) -> bytes: ...

    def close(self) -> None:
        """Whoever reads may go on; nobody comes any more."""


AnyExposed = TypeVar("AnyExposed", bound=Exposed)


class InPlacePacker(Packer, ABC, Generic[AnyExposed]):
    """See the module."""

    is_in_place = True

    def __init__(
        self,
        held: Mapping[Region, HeldRegion],
        specs: Mapping[str, TensorSpec],
        regions: Sequence[Region],
        chunks: Sequence[Chunk],
        arena: ByteArray,
    ) -> None:
        super().__init__(held, specs, regions, chunks, arena, 0)
        self._live_states = [LiveChunkState(state.chunk, state.bits, self._read) for state in self._states]
        self._states = list(self._live_states)
        self._exposed: AnyExposed | None = None

    @abstractmethod
    def look(self) -> None:
        """Find the weights, and expose them anew where they lie elsewhere than before.

        Raises `ReachError` when none can be read there, `SourceError` when one has another shape.
        """

    @abstractmethod
    def _read(self, chunk: Chunk, into: ByteArray) -> None:
        """Copy a chunk to the host, from the thread that sends it."""

    @property
    def tickets(self) -> tuple[tuple[str, bytes], ...]:
        """(kind, ticket) of the way to the weights."""
        return () if self._exposed is None else ((self._exposed.kind, self._exposed.ticket),)

    def close(self) -> None:
        """Give out no more tickets, and let go of the weights; whoever reads may go on."""
        if self._exposed is not None:
            self._exposed.close()
        self._exposed = self._taken = None

    def move(self, arena: ByteArray) -> None:
        """Go on in other host memory: of the old one, chunks are still being sent."""
        self.arena = arena
        for state, bits in zip(self._live_states, cut_arena(arena, self._chunks), strict=True):
            state.bits = bits

    def begin(self, version: Version, mode: PackMode, *, rereads: bool = True) -> Snapshot:
        """See `Packer.begin`."""
        assert mode == "off", "no bits are kept that a delta could begin from"
        super().begin(version, mode, rereads=rereads)
        for state in self._live_states:
            state.version, state.is_stale = version, True
        return LiveSnapshot(version, self._states)
