"""An arrival: one version on its way into an engine. Credits, repeats and damage, without sockets or clocks.

Chunks are asked for as there is room, asked for again when they do not come, and a version is given up when a chunk
keeps arriving damaged.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.messages import Announce, ChunkHeader, ChunkRequest, Message, Span, Staged
from weightcast.sync.staging import Staging

# A source leaves an engine that wants more at once unanswered.
MAX_CREDIT_CHUNKS = 64


@dataclass(frozen=True, slots=True)
class Request:
    """Ask the source `rank` at `address` for a chunk; its chunks have at most `chunk_bytes`."""

    rank: int
    address: str
    chunk_bytes: int
    message: ChunkRequest


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the coordinator."""

    message: Message


Effect = Request | Tell


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient a subscription is, and how much it asks for at once."""

    credit_chunks: int = 8
    """Chunks asked for and not yet received, a source (a source answers at most 64 at once)."""
    under_way_chunks: int = 64
    """The same over all sources: times the chunk's size, what may be on its way to this engine."""
    chunk_timeout_s: float = 10.0
    """A chunk that has not come after this is asked for again."""
    chunk_attempts: int = 3
    """How often a chunk may arrive damaged before the version is refused."""
    ping_every_s: float = 0.5
    lost_after_s: float = 10.0
    """A coordinator that was silent for this long is lost."""

    def __post_init__(self) -> None:
        if not 1 <= self.credit_chunks <= MAX_CREDIT_CHUNKS or self.under_way_chunks < 1:
            raise ConfigError(
                f"credit_chunks={self.credit_chunks} and under_way_chunks={self.under_way_chunks} grant no sound "
                f"credit; use 1 to {MAX_CREDIT_CHUNKS} for the first and at least 1 for the second"
            )


@dataclass(slots=True)
class Arrival:
    """See the module. An observer's arrival has no staging: there is nothing to fetch."""

    announce: Announce
    staging: Staging | None
    limits: Limits
    started_s: float
    staged_s: float = 0.0
    tensors: dict[str, torch.Tensor] | None = None
    asked_s: dict[tuple[int, int], float] = field(default_factory=dict)
    _next_index: dict[int, int] = field(default_factory=dict)
    _under_way: dict[int, int] = field(default_factory=dict)
    _askable: deque[int] = field(default_factory=deque)
    _damaged: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def is_staged(self) -> bool:
        """Whether every check has passed (an observer has nothing to check)."""
        return self.tensors is not None

    def begin(self, now_s: float) -> list[Effect]:
        """The first requests, to every source; a version without bytes is complete at once."""
        assert self.staging is not None
        self._askable.extend(rank for rank, layout in self.staging.layouts.items() if layout.chunks)
        requests = self._ask(now_s)
        if not requests:
            self._complete(now_s)
        return requests

    def _ask(self, now_s: float) -> list[Effect]:
        """Grant credit in turn to the sources that have more chunks and room, up to what may be under way."""
        assert self.staging is not None
        requests: list[Effect] = []
        while self._askable and len(self.asked_s) < self.limits.under_way_chunks:
            rank = self._askable.popleft()
            index = self._next_index.get(rank, 0)
            self._next_index[rank] = index + 1
            self._under_way[rank] = self._under_way.get(rank, 0) + 1
            requests.append(self._request(rank, index, now_s))
            self._queue(rank)
        return requests

    def _queue(self, rank: int) -> None:
        """Put a source in the line of those that may be asked, when it has more chunks and credit is left."""
        assert self.staging is not None
        has_more = self._next_index.get(rank, 0) < len(self.staging.layouts[rank].chunks)
        if has_more and self._under_way[rank] < self.limits.credit_chunks and rank not in self._askable:
            self._askable.append(rank)

    def _request(self, rank: int, index: int, now_s: float) -> Request:
        assert self.staging is not None
        self.asked_s[rank, index] = now_s
        address = self.staging.layouts[rank].address
        return Request(rank, address, self.announce.chunk_bytes, ChunkRequest(self.announce.version, index))

    def wants(self, rank: int, header: ChunkHeader) -> bool:
        """Whether a chunk is of this version and not here yet."""
        if self.staging is None or header.version != self.announce.version:
            return False
        return rank in self.staging.layouts and self.staging.is_missing(rank, header.index)

    def land(self, rank: int, index: int, buffer: npt.NDArray[np.uint8], now_s: float) -> list[Effect]:
        """Take a chunk in; `WireError` when the version cannot be trusted any more."""
        assert self.staging is not None
        try:
            self.staging.land(rank, index, buffer)
        except WireError:
            attempts = self._damaged.get((rank, index), 0) + 1
            self._damaged[rank, index] = attempts
            # A chunk that landed and still raised made a tensor whole whose digest is wrong: no repeat mends that.
            if not self.staging.is_missing(rank, index) or attempts >= self.limits.chunk_attempts:
                raise
            return [self._request(rank, index, now_s)]
        if self.asked_s.pop((rank, index), None) is not None:
            self._under_way[rank] -= 1
            self._queue(rank)
        if self.staging.num_missing == 0:
            self._complete(now_s)
            return []
        return self._ask(now_s)

    def _complete(self, now_s: float) -> None:
        assert self.staging is not None
        self.tensors = self.staging.finish()
        self.staged_s = now_s

    def repeat_overdue(self, now_s: float) -> list[Effect]:
        """Requests that were not answered in time, again."""
        if self.staging is None or self.is_staged:
            return []
        overdue = [key for key, asked_s in self.asked_s.items() if now_s - asked_s > self.limits.chunk_timeout_s]
        return [self._request(rank, index, now_s) for rank, index in overdue]

    def make_staged(self, wall_offset_s: float) -> Staged:
        """The message that says all is here and checked."""
        assert self.staging is not None
        span = Span("stage", self.started_s + wall_offset_s, self.staged_s + wall_offset_s)
        return Staged(
            self.announce.version,
            self.staging.num_bytes,
            self.staged_s - self.started_s,
            self.staging.checksums_checked,
            (span,),
        )

    def describe(self) -> str:
        """In one sentence, where it is."""
        version = self.announce.version
        if self.staging is not None and not self.is_staged:
            silent = sorted({rank for rank, _ in self.asked_s})
            return f"version {version} lacks {self.staging.num_missing} chunks, asked of the source ranks {silent}"
        return f"version {version} is staged, and waits for the fleet's policy to release it"
