"""The roster: the sources of one model as rank 0 knows them, and each one's share. Pure.

roster.add(peer, hello)             # what to say to whom; the last one in makes the assignment
roster.layout                       # for engines, once all are there
roster.sum_digests(parts)           # one digest a tensor, from all sources
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weightcast.sync.assignment import assign_regions
from weightcast.sync.digest import MASK
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.messages import PROTOCOL, Assigned, Goodbye, Layout, Message, Packed, SourceHello
from weightcast.sync.records import Offer
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.version import fingerprint


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for a peer of the control socket; `peer` is its routing id, b"" the coordinator's own process."""

    peer: bytes
    message: Message


class Roster:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], world_size: int, epoch: int, chunk_bytes: int) -> None:
        self.specs = tuple(specs)
        self.world_size = world_size
        self.fault: str | None = None
        """Why the sources make no model together; the trainer must hear of it."""
        self.layout: Layout | None = None
        self._epoch = epoch
        self._chunk_bytes = chunk_bytes
        self._model = fingerprint(self.specs)
        self._order = {spec.name: index for index, spec in enumerate(self.specs)}
        self._sources: dict[bytes, SourceHello] = {}
        self._assigned: dict[int, tuple[Region, ...]] = {}

    @property
    def peers(self) -> tuple[bytes, ...]:
        """The sources' routing ids."""
        return tuple(self._sources)

    @property
    def missing(self) -> list[int]:
        """Ranks that have not made themselves known."""
        return sorted(set(range(self.world_size)) - {hello.rank for hello in self._sources.values()})

    def rank(self, peer: bytes) -> int | None:
        """The rank of a source, None for a peer that is none."""
        hello = self._sources.get(peer)
        return None if hello is None else hello.rank

    def add(self, peer: bytes, hello: SourceHello) -> list[Outgoing]:
        """Meet a source; when all are there, tell each what it serves."""
        known = {source.rank: (other, source) for other, source in self._sources.items()}
        if hello.rank in known and known[hello.rank][1] == hello:
            # The same process over a new connection: ZeroMQ reconnected it under a new routing id.
            del self._sources[known[hello.rank][0]]
            self._sources[peer] = hello
            assigned = self._assigned.get(hello.rank)
            return [] if assigned is None else [Outgoing(peer, Assigned(self._epoch, self._chunk_bytes, assigned))]
        if hello.world_size != self.world_size or hello.rank >= self.world_size:
            reason = f"source rank {hello.rank} of {hello.world_size} joined a publisher of {self.world_size} sources"
        elif hello.rank in known:
            reason = f"source rank {hello.rank} joined twice; is another job publishing to this address?"
        elif hello.model != self._model:
            reason = f"source rank {hello.rank} lists other tensors than rank 0; specs() must agree on all ranks"
        elif hello.protocol != PROTOCOL:
            reason = f"source rank {hello.rank} speaks protocol {hello.protocol}, this is {PROTOCOL}; update weightcast"
        else:
            self._sources[peer] = hello
            return [] if self.missing else self._assign()
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
        hellos = sorted(self._sources.values(), key=lambda hello: hello.rank)
        offers = tuple(Offer(hello.rank, hello.address, self._assigned[hello.rank]) for hello in hellos)
        tickets = tuple(ticket for hello in hellos for ticket in hello.tickets)
        self.layout = Layout(self._epoch, self._chunk_bytes, offers, tickets)
        return [
            Outgoing(peer, Assigned(self._epoch, self._chunk_bytes, self._assigned[hello.rank]))
            for peer, hello in self._sources.items()
        ]

    def sum_digests(self, parts: Mapping[int, Packed]) -> bytes:
        """8 bytes a tensor, from what each rank packed. Raises `WireError` when a part does not fit its share."""
        totals = [0] * len(self.specs)
        for rank, part in parts.items():
            regions = self._assigned[rank]
            if len(part.digests) != 8 * len(regions):
                raise WireError(f"source rank {rank} gives {len(part.digests)} digest bytes for {len(regions)} regions")
            for region, digest in zip(regions, np.frombuffer(part.digests, "<u8").tolist(), strict=True):
                index = self._order[region.name]
                totals[index] = (totals[index] + digest) & MASK
        return np.array(totals, "<u8").tobytes()
