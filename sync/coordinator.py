"""The coordinator: rank 0's side of the protocol, without sockets or clocks.

It meets the other sources and gives each its share, announces a version when every source has packed it, releases
it when the fleet's policy is met, and ends the publication when all engines serve it or the deadline has come.
Every method takes the time and returns the messages to send; a thread elsewhere carries them out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from weightcast.sync import fleet
from weightcast.sync.assignment import assign_regions
from weightcast.sync.digest import MASK
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.messages import (
    CHUNK_HASH_BYTES,
    PROTOCOL,
    Announce,
    Assigned,
    Bye,
    Failed,
    Goodbye,
    Hello,
    Message,
    Offer,
    Packed,
    Ping,
    Pong,
    Published,
    Release,
    Serving,
    SourceHello,
    Span,
    Staged,
    Welcome,
)
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.version import Version, fingerprint


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for a peer of the control socket; `peer` is its routing id, b"" the coordinator's own process."""

    peer: bytes
    message: Message


@dataclass(slots=True)
class Publication:
    """A version on its way from the sources to the fleet."""

    number: int
    deadline_s: float = math.inf
    parts: dict[int, Packed] = field(default_factory=dict)
    announce: Announce | None = None
    released: bool = False
    announced_s: float = 0.0
    released_s: float = 0.0


class Coordinator:
    """See the module. `now_s` is a monotonic clock; `wall_offset_s` added to it gives seconds since 1970."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        world_size: int,
        epoch: int,
        chunk_bytes: int,
        policy: FleetPolicy,
        lost_after_s: float,
        wall_offset_s: float,
    ) -> None:
        self.specs = tuple(specs)
        self.epoch = epoch
        self.policy = policy
        self.engines: dict[bytes, EngineStatus] = {}
        self.fault: str | None = None
        self.publication: Publication | None = None
        self.current: Announce | None = None
        self.released: Version | None = None
        self._world_size = world_size
        self._chunk_bytes = chunk_bytes
        self._lost_after_s = lost_after_s
        self._wall_offset_s = wall_offset_s
        self._model = fingerprint(self.specs)
        self._order = {spec.name: index for index, spec in enumerate(self.specs)}
        self._sources: dict[bytes, SourceHello] = {}
        self._assigned: dict[int, tuple[Region, ...]] = {}
        self._ended = -1

    # Sources

    def add_source(self, peer: bytes, hello: SourceHello) -> list[Outgoing]:
        """Meet a source; when all are there, tell each what it serves."""
        known = {source.rank: (other, source) for other, source in self._sources.items()}
        if hello.rank in known and known[hello.rank][1] == hello:
            # The same process over a new connection: ZeroMQ reconnected it under a new routing id.
            del self._sources[known[hello.rank][0]]
            self._sources[peer] = hello
            assigned = self._assigned.get(hello.rank)
            return [] if assigned is None else [Outgoing(peer, Assigned(self.epoch, self._chunk_bytes, assigned))]
        if hello.world_size != self._world_size or hello.rank >= self._world_size:
            reason = f"source rank {hello.rank} of {hello.world_size} joined a publisher of {self._world_size} sources"
        elif hello.rank in known:
            reason = f"source rank {hello.rank} joined twice; is another job publishing to this address?"
        elif hello.model != self._model:
            reason = f"source rank {hello.rank} lists other tensors than rank 0; specs() must agree on all ranks"
        elif hello.protocol != PROTOCOL:
            reason = f"source rank {hello.rank} speaks protocol {hello.protocol}, this is {PROTOCOL}; update weightcast"
        else:
            self._sources[peer] = hello
            return self._assign() if len(self._sources) == self._world_size else []
        if not self._assigned:
            # While ranks gather, one that does not fit means a job that is set up wrong; later, somebody else's.
            self.fault = reason
        return [Outgoing(peer, Goodbye(reason, final=True))]

    def _assign(self) -> list[Outgoing]:
        holdings = {hello.rank: hello.regions for hello in self._sources.values()}
        try:
            self._assigned = assign_regions(self.specs, holdings)
        except SourceError as error:
            self.fault = str(error)
            return [Outgoing(peer, Goodbye(str(error)[:4000], final=True)) for peer in self._sources]
        return [
            Outgoing(peer, Assigned(self.epoch, self._chunk_bytes, self._assigned[hello.rank]))
            for peer, hello in self._sources.items()
        ]

    @property
    def missing_sources(self) -> list[int]:
        """Ranks that have not made themselves known."""
        return sorted(set(range(self._world_size)) - {hello.rank for hello in self._sources.values()})

    def add_part(self, peer: bytes, part: Packed, now_s: float, deadline_s: float | None = None) -> list[Outgoing]:
        """A source has packed its part of a version; when all have, announce it. Rank 0's part sets the deadline."""
        hello = self._sources.get(peer)
        if hello is None:
            return []
        publication = self.publication
        if part.number <= self._ended or (publication is not None and part.number < publication.number):
            # A rank that was too late for a version; it will come with the next one.
            return []
        if publication is None or publication.number < part.number:
            publication = self.publication = Publication(part.number)
        if deadline_s is not None:
            publication.deadline_s = deadline_s
        publication.parts[hello.rank] = part
        return self._announce(publication, now_s) if len(publication.parts) == self._world_size else []

    def _announce(self, publication: Publication, now_s: float) -> list[Outgoing]:
        version = Version(self.epoch, publication.number)
        offers = [
            Offer(hello.rank, hello.address, self._assigned[hello.rank], publication.parts[hello.rank].hashes)
            for hello in sorted(self._sources.values(), key=lambda hello: hello.rank)
        ]
        digests = self._sum_digests(publication.parts).astype("<u8").tobytes()
        announce = Announce(version, self._chunk_bytes, digests, tuple(offers))
        publication.announce = self.current = announce
        publication.announced_s = now_s
        self.engines = {peer: fleet.begin_version(engine) for peer, engine in self.engines.items()}
        sends = [Outgoing(peer, announce) for peer, engine in self.engines.items() if not engine.lost]
        return sends + self._advance(now_s)

    def _sum_digests(self, parts: dict[int, Packed]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        totals = [0] * len(self.specs)
        for rank, part in parts.items():
            regions = self._assigned[rank]
            if len(part.digests) != 8 * len(regions):
                raise WireError(f"source rank {rank} gives {len(part.digests)} digest bytes for {len(regions)} regions")
            for region, digest in zip(regions, np.frombuffer(part.digests, "<u8"), strict=True):
                index = self._order[region.name]
                totals[index] = (totals[index] + int(digest)) & MASK
        return np.array(totals, np.uint64)

    # Engines

    def receive(self, peer: bytes, message: Message, now_s: float) -> list[Outgoing]:
        """Answer a message of an engine; `add_source` and `add_part` are for sources."""
        if isinstance(message, Hello):
            return self._meet(peer, message, now_s)
        if isinstance(message, Ping) and peer in self._sources:
            return [Outgoing(peer, Pong(self.epoch, True))]
        engine = self.engines.get(peer)
        if engine is None or engine.lost:
            return [Outgoing(peer, Pong(self.epoch, False))]
        engine = replace(engine, last_seen_s=now_s)
        if isinstance(message, Bye):
            del self.engines[peer]
            return self._advance(now_s)
        if isinstance(message, Ping):
            self.engines[peer] = engine
            return [Outgoing(peer, Pong(self.epoch, True))]
        if isinstance(message, Staged):
            self.engines[peer] = fleet.note_staged(engine, message)
            if self.released == message.version:
                return [Outgoing(peer, Release(message.version)), *self._advance(now_s)]
        elif isinstance(message, Serving):
            self.engines[peer] = fleet.note_serving(engine, message)
        elif isinstance(message, Failed):
            self.engines[peer] = fleet.note_failed(engine, message)
        else:
            raise WireError(f"engine {engine.engine!r} sent a {type(message).__name__}, which engines do not send")
        return self._advance(now_s)

    def _meet(self, peer: bytes, hello: Hello, now_s: float) -> list[Outgoing]:
        if hello.protocol != PROTOCOL:
            reason = f"engine {hello.engine!r} speaks protocol {hello.protocol}, this is {PROTOCOL}; update weightcast"
            return [Outgoing(peer, Goodbye(reason, final=True))]
        sends = []
        for other, engine in list(self.engines.items()):
            if engine.engine == hello.engine and other != peer:
                # A crashed engine that came back before it was missed, or a second one with the same name.
                del self.engines[other]
                sends.append(Outgoing(other, Goodbye(f"another engine took the name {hello.engine!r}", final=True)))
        role = cast(fleet.Role, hello.role)
        self.engines[peer] = EngineStatus(hello.engine, role, hello.serving, now_s)
        sends.append(Outgoing(peer, Welcome(PROTOCOL, self.epoch, self.specs)))
        if self.current is not None:
            sends.append(Outgoing(peer, self.current))
        if self.released is not None:
            sends.append(Outgoing(peer, Release(self.released)))
        return sends

    def _advance(self, now_s: float) -> list[Outgoing]:
        """Release the version in flight when the policy is met; end its publication when the fleet serves it."""
        publication = self.publication
        if publication is None or publication.announce is None:
            return []
        sends = []
        version = publication.announce.version
        if not publication.released and fleet.is_released(self.policy, self.engines.values(), version):
            publication.released = True
            publication.released_s = now_s
            self.released = version
            sends = [Outgoing(peer, Release(version)) for peer, engine in self.engines.items() if not engine.lost]
        served = publication.released and fleet.is_finished(self.policy, self.engines.values(), version)
        if served or (not publication.released and self._is_refused(version)):
            sends += self._finish(publication, version, now_s)
        return sends

    def _is_refused(self, version: Version) -> bool:
        """Whether nobody is left who could still make the policy met."""
        states = [engine.state(version) for engine in self.engines.values() if engine.role == "receiver"]
        return "refused" in states and "staging" not in states

    def tick(self, now_s: float) -> list[Outgoing]:
        """Note engines that fell silent, and the deadline."""
        for peer, engine in self.engines.items():
            if not engine.lost and now_s - engine.last_seen_s > self._lost_after_s:
                self.engines[peer] = replace(engine, lost=True, reason=f"silent for {self._lost_after_s:g} s")
        publication = self.publication
        if publication is not None and now_s > publication.deadline_s:
            return self._finish(publication, Version(self.epoch, publication.number), now_s)
        return self._advance(now_s)

    def _finish(self, publication: Publication, version: Version, now_s: float) -> list[Outgoing]:
        self.publication = None
        self._ended = publication.number
        engines: Iterable[EngineStatus] = self.engines.values()
        late = sorted(set(range(self._world_size)) - publication.parts.keys())
        error = ""
        if late:
            error = f"version {version} was not packed in time by the source ranks {late}; have they stopped?"
        elif not fleet.is_committed(self.policy, engines, version):
            error = (
                f"version {version} did not reach the fleet under the policy {self.policy}: "
                f"{fleet.describe_engines(engines, version)}"
            )
        reports = tuple(fleet.make_report(engine, version) for engine in engines)
        num_chunks = sum(len(part.hashes) // CHUNK_HASH_BYTES for part in publication.parts.values())
        num_bytes = sum(report.num_bytes for report in reports)
        published = Published(
            version, reports, num_bytes, num_chunks, self._list_spans(publication, now_s), error[:4000]
        )
        return [Outgoing(peer, published) for peer in self._sources]

    def _list_spans(self, publication: Publication, now_s: float) -> tuple[Span, ...]:
        packs = tuple(span for part in publication.parts.values() for span in part.spans)
        if publication.announce is None:
            return packs
        announced_s = publication.announced_s + self._wall_offset_s
        released_s = (publication.released_s if publication.released else now_s) + self._wall_offset_s
        return (
            *packs,
            Span("stage", announced_s, released_s),
            Span("commit", released_s, max(released_s, now_s + self._wall_offset_s)),
        )
