"""An engine's part in the broadcasts of all sources of its publisher: joined, wanted or not, taken part in.

    broadcasts = Broadcasts("engine-0", transport)
    broadcasts.connect(sink, plan_of)
    broadcasts.renew(tickets, near=())                  # of the version that is announced
    if broadcasts.settle(rank, version, is_wanted):     # it comes so, and the sink will hear of it
        ...

Which way is wanted is chosen elsewhere, as for every other kind (`choose.py`); here is what can be had.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from weightcast.sync.errors import ConfigError, WeightcastError
from weightcast.sync.records import Ticket
from weightcast.sync.transports.collective_buckets import BucketPlan
from weightcast.sync.transports.collective_plan import KIND, BroadcastTicket, read_ticket
from weightcast.sync.version import Version

if TYPE_CHECKING:
    from weightcast.sync.transports.collective_member import BroadcastMember, BroadcastSink

logger = logging.getLogger(__name__)

# A store may be lost for once, so it is joined anew with a later version; not for ever.
_MAX_LOSSES = 3
_REASONS = {
    "want": "an engine that keeps some boxes asks for the chunks that have them",
    "into": "an engine whose tensors are written in place asks for a version when it waits",
    "share": "of the workers of a host one receives, whichever that is",
}


class Broadcasts:
    """See the module. `refusal` says why this engine takes part in none; used by the subscriber's thread."""

    def __init__(self, engine: str, wanted: str, refusal: str = "") -> None:
        self._engine = engine
        self._insists = wanted == KIND
        self._may_join = wanted in ("auto", KIND) and not refusal
        self._refusal = refusal
        self._sink: BroadcastSink | None = None
        self._plan_of: Callable[[int], BucketPlan | None] = lambda rank: None
        self._tickets: dict[int, BroadcastTicket] = {}
        self._faults: dict[int, str] = {}  # of tickets
        self._members: dict[tuple[int, str], BroadcastMember] = {}
        self._losses: dict[tuple[int, str], int] = {}
        self._failed: dict[tuple[int, str], str] = {}

    def connect(self, sink: "BroadcastSink", plan_of: Callable[[int], BucketPlan | None]) -> None:
        """Where chunks go, and which buckets a source sends; None for one that is not known."""
        self._sink, self._plan_of = sink, plan_of

    def prepare(self, tickets: Sequence[Ticket]) -> None:
        """Before any version is announced: who wants nothing else joins at once."""
        if self._insists:
            self.renew(tickets)

    def renew(self, tickets: Sequence[Ticket], near: Collection[int] = ()) -> None:
        """Join the sources that broadcast, but those `near` this engine, and leave those that are gone."""
        self._tickets, self._faults = {}, {}
        for ticket in tickets:
            if ticket.kind == KIND:
                try:
                    self._tickets[ticket.rank] = read_ticket(ticket.data)
                except WeightcastError as error:
                    self._faults[ticket.rank] = str(error)
        for key, member in list(self._members.items()):
            if key not in map(self._key, self._tickets) or member.failure:
                self._lose(key)
        for rank in self._tickets if self._may_join else ():
            is_known = self._key(rank) in self._members or self._key(rank) in self._failed
            if not is_known and (self._insists or rank not in near):
                self._join(rank)

    def _key(self, rank: int) -> tuple[int, str]:
        return rank, self._tickets[rank].address

    def _lose(self, key: tuple[int, str]) -> None:
        member = self._members.pop(key)
        member.close()
        if member.failure:
            self._losses[key] = self._losses.get(key, 0) + 1
            if self._losses[key] >= _MAX_LOSSES:
                self._failed[key] = member.failure
                logger.warning("broadcasts of source rank %d are given up: %s", key[0], member.failure)

    def _join(self, rank: int) -> None:
        assert self._sink is not None
        key = self._key(rank)
        try:
            from weightcast.sync.transports.collective_member import BroadcastMember

            self._members[key] = BroadcastMember(rank, self._tickets[rank], self._engine, self._insists, self._sink)
        except (ImportError, WeightcastError) as error:  # a torch without them, or without NCCL
            self._failed[key] = str(error)

    def find_failure(self, rank: int) -> str:
        """Why this engine cannot take part in a source's broadcasts; empty when it can."""
        if self._refusal or rank not in self._tickets:
            return self._refusal or self._faults.get(rank, "")
        return self._failed.get(self._key(rank), "")

    def count_engines(self, rank: int) -> int:
        """How many engines could take part, as the source knew when it announced the version."""
        return self._tickets[rank].num_engines if rank in self._tickets else 0

    def explain(self, rank: int) -> str:
        """Why a version that was wanted by broadcast comes in another way."""
        member = self._members.get(self._key(rank))
        if member is None or not member.is_joined:
            return "this engine joins them now"
        return self._tickets[rank].why or "its group was made without this engine"

    def settle(self, rank: int, version: Version | None, is_wanted: bool) -> bool:
        """Say whether broadcasts are wanted from now on; whether `version` comes so, wanted or not."""
        member = self._members.get(self._key(rank)) if rank in self._tickets else None
        if member is None:
            return False
        member.say(is_wanted)
        plan = self._plan_of(rank)
        return version is not None and plan is not None and member.takes_part(self._tickets[rank], version, plan)

    def close(self) -> None:
        """Leave. Not under a lock that the sink takes: threads are waited for."""
        members = list(self._members.values())
        self._members.clear()
        for member in members:
            member.close()
        for member in members:
            member.join()


def check_broadcasts(transport: str, others: Mapping[str, object]) -> str:
    """Why an engine with these options takes part in no broadcast; empty when it may.

    `ConfigError` where its user insists. What is None was not given.
    """
    for name, value in others.items():
        if value is not None:
            refusal = f"{_REASONS[name]}, so {name} does not go together with broadcasts"
            if transport == KIND:
                raise ConfigError(f"transport={KIND!r}: {refusal}; leave out {name}, or use transport='auto'")
            return refusal
    return ""
