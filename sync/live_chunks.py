"""Chunks whose bits are the weights themselves, of sources that pack nothing (`live_packer`, `host_live`).

state.is_live           # nothing is packed of it: it may be read as soon as the version is begun
state.bits              # of all others, and of it where somebody is to be sent it: a copy on the host
"""

from collections.abc import Callable

from weightcast.sync.chunks import Chunk
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.snapshot import ChunkState, Snapshot


class LiveChunkState(ChunkState):
    """A chunk whose bits are the weights themselves; the host's copy is made when it is looked at."""

    __slots__ = ("_host", "_read", "is_live", "is_stale", "spread")

    def __init__(self, chunk: Chunk, host: ByteArray, read: Callable[[Chunk, ByteArray], None]) -> None:
        self._read = read
        self.is_stale = True
        self.is_live = False
        """Whether there is nothing to be packed of it."""
        self.spread: tuple[memoryview, ...] = ()
        """Its bytes in host memory where they lie, one view after the other; nothing where they are not so."""
        super().__init__(chunk, (), host, 0)

    def views(self) -> tuple[memoryview, ...]:
        """See `ChunkState`."""
        return self.spread if self.is_live else ()

    @property
    def host(self) -> ByteArray:
        """Where the host's copy goes."""
        return self._host

    @property
    def bits(self) -> ByteArray:
        """The chunk's bytes on the host."""
        if self.is_stale:
            self._read(self.chunk, self._host)
            self.is_stale = False
        return self._host

    @bits.setter
    def bits(self, host: ByteArray) -> None:
        self._host, self.is_stale = host, True


class LiveSnapshot(Snapshot):
    """`num_ready` counts chunks that are digested; those of which nothing is packed are ready before."""

    @property
    def is_all_ready(self) -> bool:
        """See `Snapshot`: when nothing is to be packed."""
        return all(isinstance(state, LiveChunkState) and state.is_live for state in self.states)

    def is_ready(self, index: int) -> bool:
        """See `Snapshot`."""
        state = self.states[index] if index < len(self.states) else None
        return Snapshot.is_ready(self, index) or (isinstance(state, LiveChunkState) and state.is_live)
