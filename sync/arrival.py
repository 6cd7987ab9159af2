"""An arrival: one version on its way into an engine. Credits, repeats and damage, without sockets or clocks.

Chunks are asked for as there is room, asked for again when they do not come, and a version is given up when a chunk
keeps arriving damaged.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.errors import WireError
from weightcast.sync.messages import Announce, ChunkHeader, ChunkRequest, Message, Span, Staged
from weightcast.sync.staging import Staging


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
    """Chunks asked for and not yet received, a source; times the chunk's size, what may be under way."""
    chunk_timeout_s: float = 10.0
    """A chunk that has not come after this is asked for again."""
    chunk_attempts: int = 3
    """How often a chunk may arrive damaged before the version is refused."""
    ping_every_s: float = 0.5
    lost_after_s: float = 10.0
    """A coordinator that was silent for this long is lost."""


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
    _damaged: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def is_staged(self) -> bool:
        """Whether every check has passed (an observer has nothing to check)."""
        return self.tensors is not None

    def begin(self, now_s: float) -> list[Effect]:
        """The first requests, to every source; a version without bytes is complete at once."""
        assert self.staging is not None
        requests = [effect for rank in self.staging.layouts for effect in self._ask(rank, now_s)]
        if not requests:
            self._complete(now_s)
        return requests

    def _ask(self, rank: int, now_s: float) -> list[Effect]:
        """Grant the source `rank` credit for as many chunks as are not under way yet."""
        assert self.staging is not None
        num_chunks = len(self.staging.layouts[rank].chunks)
        requests: list[Effect] = []
        under_way = sum(1 for asked_rank, _ in self.asked_s if asked_rank == rank)
        while under_way < self.limits.credit_chunks and self._next_index.get(rank, 0) < num_chunks:
            index = self._next_index.get(rank, 0)
            self._next_index[rank] = index + 1
            requests.append(self._request(rank, index, now_s))
            under_way += 1
        return requests

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
        self.asked_s.pop((rank, index), None)
        if self.staging.num_missing == 0:
            self._complete(now_s)
            return []
        return self._ask(rank, now_s)

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
