"""The coordinator: rank 0's side of the protocol, without sockets or clocks.

It meets the other sources and gives each its share, announces a version when every source begins to pack it, seals it
with the digests of its tensors when every source is done, releases it when the fleet's policy is met, and ends the
publication when all engines serve it or the deadline has come.
Every method takes the time and returns the messages to send; a thread elsewhere carries them out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from weightcast.sync import fleet
from weightcast.sync.advice import DeltaAdvisor
from weightcast.sync.errors import WireError
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.messages import (
    PROTOCOL,
    Announce,
    Bye,
    Failed,
    Goodbye,
    Hello,
    Message,
    Packed,
    Packing,
    Ping,
    Pong,
    Published,
    Release,
    Sealed,
    Serving,
    SourceHello,
    Staged,
    Welcome,
)
from weightcast.sync.records import Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.roster import Outgoing, Roster
from weightcast.sync.version import Version


@dataclass(slots=True)
class Publication:
    """A version on its way from the sources to the fleet."""

    number: int
    deadline_s: float = math.inf
    begun: dict[int, Packing] = field(default_factory=dict)
    parts: dict[int, Packed] = field(default_factory=dict)
    announce: Announce | None = None
    sealed: Sealed | None = None
    left: dict[str, EngineStatus] = field(default_factory=dict)
    """By name, engines that have served it and left before it ended."""
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
        self.roster = Roster(specs, world_size, epoch, chunk_bytes)
        self.epoch = epoch
        self.policy = policy
        self.engines: dict[bytes, EngineStatus] = {}
        self.publication: Publication | None = None
        self.current: Announce | None = None
        self.sealed: Sealed | None = None
        self.released: Version | None = None
        self._advisor = DeltaAdvisor()
        self._lost_after_s = lost_after_s
        self._wall_offset_s = wall_offset_s
        self._ended = -1

    # Sources

    def add_source(self, peer: bytes, hello: SourceHello) -> list[Outgoing]:
        """Meet a source; when all are there, tell each what it serves, and engines who does."""
        had_layout = self.roster.layout is not None
        sends = self.roster.add(peer, hello)
        if not had_layout and self.roster.layout is not None:
            receivers = [other for other, engine in self.engines.items() if engine.role == "receiver"]
            sends += [Outgoing(other, self.roster.layout) for other in receivers]
        return sends

    @property
    def fault(self) -> str | None:
        """Why the sources make no model together."""
        return self.roster.fault

    def add_packing(
        self, peer: bytes, packing: Packing, now_s: float, deadline_s: float | None = None
    ) -> list[Outgoing]:
        """A source begins to pack a version; when all have, announce it. Rank 0's sets the deadline."""
        rank, publication = self.roster.rank(peer), self.publication
        if rank is None or packing.number <= self._ended:
            # A rank that was too late for a version; it will come with the next one.
            return []
        if publication is not None and packing.number < publication.number:
            return []
        if publication is None or publication.number < packing.number:
            publication = self.publication = Publication(packing.number)
        if deadline_s is not None:
            publication.deadline_s = deadline_s
        publication.begun[rank] = packing
        return self._announce(publication, now_s) if len(publication.begun) == self.roster.world_size else []

    def _announce(self, publication: Publication, now_s: float) -> list[Outgoing]:
        version = Version(self.epoch, publication.number)
        tickets = tuple(ticket for _, packing in sorted(publication.begun.items()) for ticket in packing.tickets)
        ready = tuple(rank for rank, packing in sorted(publication.begun.items()) if packing.is_ready)
        publication.announce = self.current = Announce(version, tickets, ready)
        publication.announced_s = now_s
        self.sealed = None
        self.engines = {peer: fleet.begin_version(engine) for peer, engine in self.engines.items()}
        return self._tell_engines(publication.announce) + self._advance(now_s)

    def _tell_engines(self, message: Message) -> list[Outgoing]:
        return [Outgoing(peer, message) for peer, engine in self.engines.items() if not engine.lost]

    def add_part(self, peer: bytes, part: Packed, now_s: float) -> list[Outgoing]:
        """A source has packed its part of a version; when all have, seal it."""
        rank, publication = self.roster.rank(peer), self.publication
        if rank is None or publication is None or part.number != publication.number:
            return []
        publication.parts[rank] = part
        if len(publication.parts) < self.roster.world_size or publication.announce is None:
            return []
        digests = self.roster.sum_digests(publication.parts)
        publication.sealed = self.sealed = Sealed(publication.announce.version, digests)
        return self._tell_engines(self.sealed) + self._advance(now_s)

    # Engines

    def receive(self, peer: bytes, message: Message, now_s: float) -> list[Outgoing]:
        """Answer a message of an engine; `add_source` and `add_part` are for sources."""
        if isinstance(message, Hello):
            return self._meet(peer, message, now_s)
        if isinstance(message, Ping) and self.roster.rank(peer) is not None:
            return [Outgoing(peer, Pong(self.epoch, True))]
        engine = self.engines.get(peer)
        if engine is None or engine.lost:
            return [Outgoing(peer, Pong(self.epoch, False))]
        engine = replace(engine, last_seen_s=now_s)
        if isinstance(message, Bye):
            # The answer says that everything before it was heard as well.
            return [Outgoing(peer, Goodbye("goodbye", final=True)), *self._leave(peer, now_s)]
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

    def _leave(self, peer: bytes, now_s: float) -> list[Outgoing]:
        """An engine leaves; one that has served the version on its way stays in that one's report."""
        engine, publication = self.engines.pop(peer), self.publication
        announce = None if publication is None else publication.announce
        if publication is not None and announce is not None and engine.state(announce.version) == "serving":
            publication.left[engine.engine] = engine
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
        sends.append(Outgoing(peer, Welcome(PROTOCOL, self.epoch, self.roster.specs)))
        if self.roster.layout is not None and role == "receiver":
            sends.append(Outgoing(peer, self.roster.layout))
        if self.current is not None:
            sends.append(Outgoing(peer, self.current))
        if self.sealed is not None:
            sends.append(Outgoing(peer, self.sealed))
        if self.released is not None:
            sends.append(Outgoing(peer, Release(self.released)))
        return sends

    def _advance(self, now_s: float) -> list[Outgoing]:
        """Release the version in flight when the policy is met; end its publication when the fleet serves it."""
        publication = self.publication
        if publication is None or publication.announce is None or publication.sealed is None:
            return []
        sends = []
        version = publication.announce.version
        if not publication.released and fleet.is_released(self.policy, self.engines.values(), version):
            publication.released = True
            publication.released_s = now_s
            self.released = version
            sends = self._tell_engines(Release(version))
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
        if self.current is not None:
            # Sources may change what engines read: who comes later asks whether it is still there.
            self.current = replace(self.current, ready=())
        present = {engine.engine: engine for engine in self.engines.values()}
        engines = list((publication.left | present).values())
        late = sorted(set(range(self.roster.world_size)) - publication.parts.keys())
        error = ""
        if late:
            error = f"version {version} was not packed in time by the source ranks {late}; have they stopped?"
        elif not fleet.is_committed(self.policy, engines, version):
            error = (
                f"version {version} did not reach the fleet under the policy {self.policy}: "
                f"{fleet.describe_engines(engines, version)}"
            )
        reports = tuple(fleet.make_report(engine, version) for engine in engines)
        sources = tuple(part.report for _, part in sorted(publication.parts.items()))
        num_bytes = sum(report.num_bytes for report in reports)
        delta, why = self._advisor.advise(sources, reports)
        spans = self._list_spans(publication, now_s)
        published = Published(version, reports, sources, num_bytes, spans, error[:4000], delta, why)
        return [Outgoing(peer, published) for peer in self.roster.peers]

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
