"""An arrival: one version on its way into an engine. Credits, repeats and damage, without sockets or clocks.

Chunks are asked for as there is room, asked for again when they do not come, and a version is given up when a chunk
keeps arriving damaged. A tensor that is complete and wrong is fetched once more, whole and over the wire: bits that a
delta began from may not have been what they should, and memory that was read may have been overwritten meanwhile.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile

import torch

from weightcast.sync.broadcast_offer import BroadcastOffer
from weightcast.sync.effects import Effect, Request, list_reads
from weightcast.sync.errors import WireError
from weightcast.sync.host.lease import Lease
from weightcast.sync.landing import Body
from weightcast.sync.ledger import ChunkKey
from weightcast.sync.limits import MAX_AT_ONCE_BYTES, Limits, size_device_run, size_run
from weightcast.sync.messages import MAX_RUN_CHUNKS, Announce, ChunkHeader, ChunkRequest
from weightcast.sync.regions import TensorSpec
from weightcast.sync.staging import Staging
from weightcast.sync.version import Version

# The kind of memory of which runs of chunks are landed at once, where the staged tensors lie on a device as well.
ON_DEVICE = "cuda_ipc"
# What is said to have brought a version that another worker of the host received.
HOST_TRANSPORT = "host"


@dataclass(slots=True)
class Arrival:
    """See the module. An observer's arrival has no staging: there is nothing to fetch.

    Nor has one that another worker of the host receives; its tensors are there as long as `lease` is. One that
    `must_lend` lies where all those workers read, the engine itself only under a lease, too. `reached` names the kind
    of memory by which each source rank is read without its help; other sources send. `waits_for_engine` is for engines
    that prepare for what is staged (`preview.py`), until they have.
    """

    announce: Announce
    staging: Staging | None
    chunk_bytes: int
    limits: Limits
    started_s: float
    reached: dict[int, str] = field(default_factory=dict)
    staged_s: float = 0.0
    tensors: Mapping[str, torch.Tensor] | None = None
    specs: tuple[TensorSpec, ...] = ()
    lease: Lease | None = None
    must_lend: bool = False
    waits_for_engine: bool = False
    num_repeats: int = 0
    asked_s: dict[ChunkKey, float] = field(default_factory=dict)
    _again: deque[ChunkKey] = field(default_factory=deque)
    _only_sent: set[ChunkKey] = field(default_factory=set)
    _refetched: set[str] = field(default_factory=set)
    _next_place: dict[int, int] = field(default_factory=dict)
    _under_way: dict[int, int] = field(default_factory=dict)
    _askable: deque[int] = field(default_factory=deque)
    _damaged: dict[ChunkKey, int] = field(default_factory=dict)
    offer: BroadcastOffer = field(default_factory=BroadcastOffer)
    _order: dict[int, Sequence[int]] = field(default_factory=dict)

    @property
    def version(self) -> Version:
        """What is on its way."""
        return self.announce.version

    @property
    def is_staged(self) -> bool:
        """Whether every check has passed (an observer has nothing to check)."""
        return self.tensors is not None

    @property
    def is_prepared(self) -> bool:
        """Whether the engine may take it."""
        return self.is_readable and not self.waits_for_engine

    @property
    def is_readable(self) -> bool:
        """Whether the engine may look at it: nobody writes there meanwhile."""
        return self.is_staged and (self.lease is not None or not self.must_lend)

    @property
    def transport(self) -> str:
        """How the chunks came: a kind of transport, or several; nothing when none were to come."""
        if self.staging is None:
            return "" if self.lease is None else HOST_TRANSPORT
        return self.offer.name_transport(self.staging.order, self.reached)

    @property
    def num_bytes(self) -> int:
        """Bodies as this engine received them."""
        return 0 if self.staging is None else self.staging.num_bytes

    @property
    def checksums_checked(self) -> int:
        """Of chunks and of tensors, by this engine."""
        return 0 if self.staging is None else self.staging.checksums_checked

    def begin(self, now_s: float) -> list[Effect]:
        """The first requests, but to sources that broadcast; what is all there, and is read, is read at once."""
        assert self.staging is not None
        self.offer = BroadcastOffer.take(self.reached, self.limits.chunk_timeout_s, now_s)
        self._order = dict(self.staging.order)
        counts = {rank: len(indices) for rank, indices in self._order.items() if indices and not self.offer.holds(rank)}
        at_once = {rank: count for rank, count in counts.items() if self._reads_at_once(rank)}
        self._next_place |= at_once
        self._askable.extend(rank for rank in counts if rank not in at_once)
        reads = (list_reads(rank, self.version, count, self.chunk_bytes) for rank, count in at_once.items())
        return [*chain.from_iterable(reads), *self._ask(now_s)]

    def _reads_at_once(self, rank: int) -> bool:
        """Whether all of a source is read without asking. While a host does that the engine hears and says nothing."""
        is_there = rank in self.announce.ready and self.lands_runs(rank)
        return is_there and (self._lands_on_device(rank) or self.asked_bytes <= MAX_AT_ONCE_BYTES)

    def ask_for(self, rank: int, header: ChunkHeader, now_s: float) -> list[Effect]:
        """Ask for chunks, one by one."""
        self._again.extend((rank, index) for index in range(header.index, header.index + header.count))
        return self._ask(now_s)

    def ask_rest(self, rank: int, now_s: float) -> list[Effect]:
        """A source's broadcast is over, or late: ask for what it did not bring."""
        if self.staging is None or self.is_staged:
            return []
        missing = tuple(index for index in self._order[rank] if self.staging.is_missing(rank, index))
        if not self.offer.end(rank, len(missing)):
            return []
        self.num_repeats += len(missing) if self.offer.has_brought(rank) else 0
        self._order[rank] = missing
        self._askable.append(rank)
        return self._ask(now_s)

    def _ask(self, now_s: float) -> list[Effect]:
        """Grant credit in turn to the sources that have more chunks and room, up to what may be under way."""
        assert self.staging is not None
        requests: list[Effect] = []
        while self._again and len(self.asked_s) < self._max_under_way:
            rank, index = self._again.popleft()
            if not self.staging.is_missing(rank, index):  # a late broadcast brought it
                continue
            self._under_way[rank] = self._under_way.get(rank, 0) + 1
            requests.append(self._request(rank, index, now_s))
        while self._askable and len(self.asked_s) < self._max_under_way:
            rank = self._askable.popleft()
            if (place := self._find_place(rank)) == len(self._order[rank]):
                continue
            count = self._find_run(rank, place)
            self._next_place[rank] = place + count
            self._under_way[rank] = self._under_way.get(rank, 0) + count
            requests.append(self._request(rank, self._order[rank][place], now_s, count))
            self._queue(rank)
        return requests

    def _find_place(self, rank: int) -> int:
        """Where in the order the next chunk is that has to be asked for: a late broadcast may have brought some."""
        assert self.staging is not None
        order, place = self._order[rank], self._next_place.get(rank, 0)
        while place < len(order) and not self.staging.is_missing(rank, order[place]):
            place += 1
        return place

    def _queue(self, rank: int) -> None:
        """Put a source in the line of those that may be asked, when it has more chunks and credit is left."""
        num_left = len(self._order[rank]) - self._next_place.get(rank, 0)
        run = self._max_run(rank)
        # Of what is read the source packs one run while another is read.
        room = (2 * run if rank in self.reached else self.limits.credit_chunks) - self._under_way[rank]
        if num_left > 0 and room >= min(num_left, run) and rank not in self._askable:
            self._askable.append(rank)

    def _max_run(self, rank: int) -> int:
        """How many chunks of a source one message asks."""
        num_asked = self._next_place.get(rank, 0)
        num_left = len(self._order[rank]) - num_asked
        if rank not in self.reached:
            return 1
        return (size_device_run if self._lands_on_device(rank) else size_run)(num_asked, num_left, self.chunk_bytes)

    def lands_runs(self, rank: int) -> bool:
        """Whether many chunks of a source are landed at once (`run_staging`)."""
        return self.staging is not None and self.reached.get(rank) == self.staging.run_kind

    def _lands_on_device(self, rank: int) -> bool:
        return self.lands_runs(rank) and self.reached[rank] == ON_DEVICE

    @property
    def _max_under_way(self) -> int:
        """How many chunks may be asked for; of those that are read on a device, nothing is on its way."""
        limit = self.limits.under_way_chunks
        return max(limit, 2 * MAX_RUN_CHUNKS) if any(map(self._lands_on_device, self.reached)) else limit

    def _find_run(self, rank: int, place: int) -> int:
        """How many chunks from a place in the order on, read neighbours of one base, are asked for in one message."""
        staging = self.staging
        assert staging is not None
        order = self._order[rank]
        end = min(place + self._max_run(rank), len(order))
        end = min(end, place + max(1, self._max_under_way - len(self.asked_s)))
        index, base = order[place], staging.base(rank, order[place])

        def is_alike(other: int) -> bool:
            number, follows = order[other], order[other] - index == other - place
            return follows and self.reads(rank, number) and staging.base(rank, number) == base

        return 1 + sum(1 for _ in takewhile(is_alike, range(place + 1, end) if self.reads(rank, index) else ()))

    def _request(self, rank: int, index: int, now_s: float, count: int = 1) -> Request:
        assert self.staging is not None
        self.asked_s |= dict.fromkeys(((rank, number) for number in range(index, index + count)), now_s)
        base = self.staging.base(rank, index)
        # The digests vouch for what comes whole; only when one was wrong it matters which chunk it was.
        hashed = (rank, index) in self._only_sent
        message = ChunkRequest(self.announce.version, index, base, self.reads(rank, index), count, hashed)
        return Request(rank, self.staging.layouts[rank].address, self.chunk_bytes, message)

    def reads(self, rank: int, index: int) -> bool:
        """Whether a chunk is read out of its source's memory, not sent."""
        return rank in self.reached and (rank, index) not in self._only_sent

    @property
    def asked_bytes(self) -> int:
        """See `Staging`; 0 where another worker receives."""
        return 0 if self.staging is None else self.staging.asked_bytes

    def _repeat(self, rank: int, index: int, now_s: float) -> Request:
        self.num_repeats += 1
        return self._request(rank, index, now_s)

    def wants(self, rank: int, header: ChunkHeader) -> bool:
        """Whether a chunk is of this version and not here yet."""
        if self.staging is None or header.version != self.announce.version:
            return False
        return rank in self.staging.layouts and self.staging.is_missing(rank, header.index)

    def land(
        self, rank: int, header: ChunkHeader, body: Body | None, now_s: float, *, is_hashed: bool = True
    ) -> list[Effect]:
        """Take chunks in, all that `header` stands for; `WireError` when the version cannot be trusted any more."""
        assert self.staging is not None
        keys = [(rank, index) for index in range(header.index, header.index + header.count)]
        self.offer.hear(rank, now_s)
        try:
            self.staging.land(rank, header, body, is_hashed=is_hashed)
        except WireError:
            attempts = 1 + max(self._damaged.get(key, 0) for key in keys)
            self._damaged |= dict.fromkeys(keys, attempts)
            if attempts >= self.limits.chunk_attempts:
                raise
            self._only_sent.update(keys)
            return [self._repeat(*key, now_s) for key in keys]
        if num_asked := sum(self.asked_s.pop(key, None) is not None for key in keys):
            self._under_way[rank] -= num_asked
            self._queue(rank)
        return self._advance(now_s)

    def seal(self, digests: bytes, now_s: float) -> list[Effect]:
        """The sources' digests; `WireError` when they cannot be those of this model."""
        assert self.staging is not None
        if not self.staging.is_sealed:
            self.staging.seal(digests)
            self._only_sent.update(self.staging.late_keys)
            self._again.extend(self.staging.late_keys)
        return self._advance(now_s)

    def _advance(self, now_s: float) -> list[Effect]:
        assert self.staging is not None
        for name in self.staging.take_wrong():
            if name in self._refetched:
                raise WireError(self.staging.describe_wrong(name))
            self._refetched.add(name)
            keys = self.staging.reopen([name])
            self.num_repeats += len(keys)
            self._only_sent.update(keys)
            self._again.extend(keys)
        if self.staging.is_whole:
            self.tensors = self.staging.finish()
            self.staged_s = now_s
            return []
        return self._ask(now_s)

    def send_again(self, rank: int, now_s: float) -> list[Effect]:
        """A source's memory cannot be read any more: it is to send what was to be read."""
        self.reached.pop(rank, None)
        return [self._repeat(*key, now_s) for key in list(self.asked_s) if key[0] == rank]

    def repeat_overdue(self, now_s: float) -> list[Effect]:
        """Requests that were not answered in time, again."""
        if self.staging is None or self.is_staged:
            return []
        effects = [effect for rank in self.offer.list_late(now_s) for effect in self.ask_rest(rank, now_s)]
        overdue = [key for key, asked_s in self.asked_s.items() if now_s - asked_s > self.limits.chunk_timeout_s]
        return effects + [self._repeat(*key, now_s) for key in overdue]
