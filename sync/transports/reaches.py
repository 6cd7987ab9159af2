"""Memory that is read without its owner's help, of whichever kind: made on a source, opened on an engine.

    arena = make_arena(("shared_memory",), num_bytes)       # private memory where the machine has none of these
    arena.tickets                                           # for the announcement

    reaches = Reaches(("shared_memory",), timeout_s=2)
    reaches.renew(announce.tickets)                         # {source rank: kind} of those that opened

Each kind is a module beside this one, with `expose(num_bytes)` and `reach(ticket, timeout_s)`; it is imported when
somebody asks for it.
"""

import importlib
import logging
from collections.abc import Sequence

from weightcast.sync.errors import ConfigError, WeightcastError
from weightcast.sync.records import Ticket
from weightcast.sync.snapshot import allocate_arena
from weightcast.sync.transports.base import ByteArray, Exposed, Reach

logger = logging.getLogger(__name__)

KINDS = ("shared_memory", "mooncake", "cuda_ipc")


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds themselves, or `ConfigError` for an unknown one."""
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ConfigError(f"no such kind of memory: {', '.join(unknown)}; allowed are {', '.join(KINDS)}")
    return tuple(kinds)


class Arena:
    """Memory that a source packs into, and how it may be reached."""

    def __init__(self, memory: ByteArray, exposed: Exposed | None) -> None:
        self.memory = memory
        self._exposed = exposed

    @property
    def tickets(self) -> tuple[tuple[str, bytes], ...]:
        """(kind, ticket) of each way to reach it."""
        return () if self._exposed is None else ((self._exposed.kind, self._exposed.ticket),)

    def close(self) -> None:
        """Give out no more tickets. Whoever reads it may go on."""
        if self._exposed is not None:
            self._exposed.close()


def make_arena(kinds: Sequence[str], num_bytes: int) -> Arena:
    """Zeroed memory of the first kind that this machine has, or private memory."""
    for kind in check_kinds(kinds) if num_bytes else ():
        try:
            module = importlib.import_module(f"weightcast.sync.transports.{kind}")
            exposed: Exposed = module.expose(num_bytes)
        except (ImportError, OSError, WeightcastError) as error:
            logger.info("engines cannot read this source's memory by %s: %s", kind, error)
            continue
        return Arena(exposed.memory, exposed)
    return Arena(allocate_arena(num_bytes), None)


class Reaches:
    """What an engine has open of its sources' memory. `kinds` lists those that it may use, the best first."""

    def __init__(self, kinds: Sequence[str], timeout_s: float) -> None:
        self._kinds = check_kinds(kinds)
        self._timeout_s = timeout_s
        self._open: dict[int, tuple[Ticket, Reach]] = {}
        self._refused: set[Ticket] = set()

    def renew(self, tickets: Sequence[Ticket]) -> dict[int, str]:
        """Open what is new and close what is gone; the kind by which each source rank can be reached."""
        by_rank: dict[int, list[Ticket]] = {}
        for ticket in tickets:
            if ticket.kind in self._kinds:
                by_rank.setdefault(ticket.rank, []).append(ticket)
        for rank in [rank for rank, (ticket, _) in self._open.items() if ticket not in by_rank.get(rank, ())]:
            self.close_rank(rank)
        self._refused.intersection_update(tickets)
        for rank, offered in by_rank.items():
            for ticket in sorted(offered, key=lambda ticket: self._kinds.index(ticket.kind)):
                if rank not in self._open and ticket not in self._refused:
                    self._try(ticket)
        return {rank: ticket.kind for rank, (ticket, _) in self._open.items()}

    def _try(self, ticket: Ticket) -> None:
        try:
            module = importlib.import_module(f"weightcast.sync.transports.{ticket.kind}")
            self._open[ticket.rank] = (ticket, module.reach(ticket.data, self._timeout_s))
        except (ImportError, OSError, WeightcastError) as error:
            # Once a ticket: every version names it again.
            self._refused.add(ticket)
            logger.info("source rank %d is not reached by %s: %s", ticket.rank, ticket.kind, error)

    def get(self, rank: int) -> Reach | None:
        """A source's memory, if it is open."""
        found = self._open.get(rank)
        return None if found is None else found[1]

    def close_rank(self, rank: int) -> None:
        """Let go of a source's memory, and do not try this ticket again."""
        ticket, reach = self._open.pop(rank)
        self._refused.add(ticket)
        reach.close()

    def close(self) -> None:
        """Let go of everything."""
        for rank in list(self._open):
            self.close_rank(rank)
