"""Snapshots: a source's part of one version, served chunk by chunk while it is still being packed.

The packer (`packer.py`) writes chunks into an arena of host memory and counts them ready; the source's loop asks for
bodies of chunks that are. A body is the whole chunk, or what changed since a version that the receiver has:

    snapshot.body(index, base=None)             # dense: a view of the arena
    snapshot.body(index, base=Version(3, 6))    # a delta, also over several versions; or nothing, when none changed

What changed is kept for the last few versions, as the way back from the present bits. Following it gives the bits that
a receiver has, and the codec then finds the one delta that brings it up to date: merging costs no memory for models.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from weightcast.sync.chunk_delta import ChunkDelta, Part, apply_chunk, encode_chunk
from weightcast.sync.chunks import Chunk
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.digest_pages import write_pages
from weightcast.sync.version import Version

# A delta of more than this share of the chunk is not worth its trouble: the chunk goes as it is.
MAX_DELTA_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Step:
    """What a chunk's bits went through from `base` to the version after it."""

    base: Version
    delta: ChunkDelta


@dataclass(frozen=True, slots=True)
class Body:
    """What answers a request: see `ChunkHeader`. `data` is None where nothing follows the header."""

    encoding: str
    base: Version | None = None
    data: memoryview | None = None
    spread: tuple[memoryview, ...] = ()
    """In place of `data`, where it lies in several places."""

    @property
    def num_bytes(self) -> int:
        """Of what follows the header."""
        return sum(map(len, self.spread)) if self.data is None else len(self.data)

    def hash(self) -> bytes:
        """The xxh3-128 of the data."""
        return b"" if self.data is None else xxhash.xxh3_128_digest(self.data)


ABSENT = Body("absent")


class ChunkState:
    """One chunk of a source: its place in the arena, the version of the bits there, and the steps that led to them."""

    __slots__ = ("bits", "chunk", "digests", "parts", "steps", "version")

    def __init__(self, chunk: Chunk, parts: tuple[Part, ...], bits: ByteArray, history: int) -> None:
        self.chunk = chunk
        self.parts = parts
        self.bits = bits
        self.version: Version | None = None
        self.digests: Sequence[int] = ()
        """Of each piece, as it was packed last."""
        self.steps: deque[Step] = deque(maxlen=history)

    def views(self) -> tuple[memoryview, ...]:
        """Its bits where they lie, if those are several places; see `host_live`."""
        return ()

    def piece_digests(self) -> Sequence[int]:
        """The digest of each piece of what was packed last."""
        return self.digests

    def advance(self, version: Version, delta: ChunkDelta | None) -> None:
        """The bits are those of `version` now, by `delta`; None when that is not known, or too much."""
        base, self.version = self.version, version
        if delta is None or base is None or self.steps.maxlen == 0:
            self.steps.clear()
            return
        self.steps.append(Step(base, delta))
        limit_bytes = MAX_DELTA_SHARE * self.chunk.num_bytes
        while sum(len(step.delta.reverse) for step in self.steps) > limit_bytes:
            self.steps.popleft()

    def find_delta(self, base: Version, *, pack: bool) -> ChunkDelta | None:
        """What changed since `base`; None when that is not known, or too much."""
        since = [step for step in self.steps if step.base >= base]
        if not since or since[0].base != base:
            return None
        if len(since) == 1 and (since[0].delta.packed is not None or not pack):
            return since[0].delta
        if all(step.delta.is_same for step in since):
            return since[0].delta
        old = self.bits.copy()
        for step in reversed(since):
            if not step.delta.is_same:
                apply_chunk(step.delta.reverse, self.parts, old)
        return encode_chunk(old, self.bits, self.parts, int(MAX_DELTA_SHARE * self.chunk.num_bytes), pack=pack)


@dataclass(slots=True)
class Snapshot:
    """See the module. The packer's thread counts `num_ready` up; the loop's thread reads chunks below it."""

    version: Version
    states: Sequence[ChunkState]
    prefer_packed: bool = False
    num_ready: int = 0
    is_whole: bool = False
    """Whether every chunk is copied as it is, none compared, so that the same bytes serve all."""
    arena: ByteArray | None = None
    """The memory in which all chunks lie back to back, where it has them as they are packed."""
    _hashes: dict[int, bytes] = field(default_factory=dict)
    _merged: dict[tuple[int, Version], Body] = field(default_factory=dict)
    _pages: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.states)

    @property
    def is_all_ready(self) -> bool:
        """Whether all chunks are there, for those that read this source's memory."""
        return self.num_ready == len(self.states)

    def is_ready(self, index: int) -> bool:
        """Whether chunk `index` is packed; pages of digests, which follow the chunks, are there with the last one."""
        return index < self.num_ready or (index >= len(self.states) and self.num_ready == len(self.states))

    def body(self, index: int, base: Version | None, *, reached: bool = False, spreads: bool = False) -> Body:
        """The answer to a request for a chunk that is ready.

        With `reached` the receiver reads the arena by itself, and is only told that it may. With `spreads` a whole
        chunk may come in several places.
        """
        if index >= len(self.states):
            # Pages of digests are sent, and lie in no memory that is read.
            return ABSENT if reached else self._page(index - len(self.states))
        state = self.states[index]
        if base == self.version:
            return Body("same", base)
        if base is not None and (body := self._body_since(state, index, base, reached)) is not None:
            return body
        if reached:
            return Body("dense")
        if spreads and (views := state.views()):
            return Body("dense", None, None, views)
        return Body("dense", None, state.bits.data.toreadonly())

    def _body_since(self, state: ChunkState, index: int, base: Version, reached: bool) -> Body | None:
        newest = state.steps[-1] if state.steps else None
        if newest is None or (reached and not (newest.base == base and newest.delta.is_same)):
            return None
        if (body := self._merged.get((index, base))) is not None:
            return body
        delta = state.find_delta(base, pack=self.prefer_packed)
        if delta is None:
            return None
        if delta.is_same:
            body = Body("same", base)
        elif self.prefer_packed and delta.packed is not None:
            body = Body("zdelta", base, memoryview(delta.packed))
        else:
            body = Body("delta", base, memoryview(delta.forward))
        self._merged[index, base] = body
        return body

    def _page(self, page: int) -> Body:
        """See `digest_pages`."""
        if self.num_ready < len(self.states):
            return ABSENT
        if self._pages is None:
            self._pages = write_pages(digest for state in self.states for digest in state.piece_digests())
        return Body("dense", None, memoryview(self._pages[page])) if page < len(self._pages) else ABSENT

    def hash(self, index: int, body: Body) -> bytes:
        """The hash of a body; of a whole chunk it is taken once for all receivers."""
        if body.encoding != "dense" or body.data is None:
            return body.hash()
        if index not in self._hashes:
            self._hashes[index] = body.hash()
        return self._hashes[index]


def allocate_arena(num_bytes: int) -> ByteArray:
    """Private memory for all chunks of a source. Zeroed, so that the gaps between pieces are the same every time."""
    return np.zeros(num_bytes, np.uint8)
