"""Memory that is read without its owner's help, of whichever kind: made on a source, opened on an engine.

    arena = make_arena(("shared_memory",), num_bytes)       # private memory where the machine has none of these
    arena.tickets                                           # for the announcement

    reaches = Reaches("auto", timeout_s=2)
    reaches.renew(announce.tickets, num_sources)            # {source rank: kind} of those that are read so

Each kind is a module beside this one, with `expose(num_bytes)` and `reach(ticket, timeout_s)`; it is imported when
somebody asks for it. `tcp` exposes no memory: its server has the ticket, and `reach` makes a link on which the source
sends. Nor does `collective`, by which a source sends to many engines at once, whether they have asked or not.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from weightcast.sync.errors import ConfigError, WeightcastError
from weightcast.sync.records import Ticket
from weightcast.sync.snapshot import allocate_arena
from weightcast.sync.transports import collective_plan
from weightcast.sync.transports.base import ByteArray, Exposed, Reach
from weightcast.sync.transports.broadcasts import Broadcasts
from weightcast.sync.transports.choose import Choice, Context, Kind, Offers, blend_rate, choose_reach
from weightcast.sync.transports.tcp import TcpLink
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)

MEMORY_KINDS = ("shared_memory", "mooncake", "cuda_ipc")
KINDS = (*MEMORY_KINDS, "tcp", collective_plan.KIND)
EXPOSED_KINDS = (*KINDS, collective_plan.NCCL_KIND)
# A link may break for once, so it is made anew with a later version; not for ever.
_MAX_LOSSES = 3


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds themselves, or `ConfigError` for an unknown one."""
    if unknown := sorted(set(kinds) - set(EXPOSED_KINDS)):
        raise ConfigError(f"no such kind of memory: {', '.join(unknown)}; allowed are {', '.join(EXPOSED_KINDS)}")
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

    @property
    def device_memory(self) -> torch.Tensor | None:
        """As many bytes on a device, where it is these that are reached."""
        return None if self._exposed is None else self._exposed.device_memory

    def close(self) -> None:
        """Give out no more tickets. Whoever reads it may go on."""
        if self._exposed is not None:
            self._exposed.close()


def make_arena(kinds: Sequence[str], num_bytes: int) -> Arena:
    """Zeroed memory of the first kind that this machine has, or private memory."""
    for kind in check_kinds(kinds) if num_bytes else ():
        if kind not in MEMORY_KINDS:
            continue
        try:
            module = importlib.import_module(f"weightcast.sync.transports.{kind}")
            exposed: Exposed = module.expose(num_bytes)
        except (ImportError, OSError, WeightcastError) as error:
            logger.info("engines cannot read this source's memory by %s: %s", kind, error)
            continue
        return Arena(exposed.memory, exposed)
    return Arena(allocate_arena(num_bytes), None)


class Reaches:
    """What an engine has open of its sources' memory, and which way it takes to each.

    `wanted` is "auto", "zmq" or one kind; `timeout_s` bounds every read.
    """

    def __init__(self, wanted: str, timeout_s: float, broadcasts: Broadcasts | None = None) -> None:
        if wanted not in ("auto", "zmq", *KINDS):
            allowed = ", ".join(("auto", "zmq", *KINDS))
            raise ConfigError(f"transport={wanted!r} is not known; use one of {allowed}")
        self._wanted = wanted
        self.broadcasts = (
            Broadcasts("", wanted, "this receiver has no part in them") if broadcasts is None else broadcasts
        )
        self._timeout_s = timeout_s
        self._open: dict[Ticket, Reach | TcpLink] = {}
        self._losses: dict[Ticket, int] = {}
        self._failed: dict[Ticket, str] = {}
        self._rates: dict[str, float] = {}
        self._choices: dict[int, Choice] = {}

    def renew(self, tickets: Sequence[Ticket], num_sources: int, version: Version | None = None) -> dict[int, str]:
        """Open what is new and close what is gone; the kind by which each source rank is read, of those that are.

        `version` is what is announced; without it none comes by broadcast.

        Raises `ReachError` when the one kind that is wanted cannot be had.
        """
        for ticket in [ticket for ticket in self._open if ticket not in tickets]:
            self._open.pop(ticket).close()
        self._failed = {ticket: why for ticket, why in self._failed.items() if ticket in tickets}
        for ticket in sorted(tickets, key=lambda ticket: ticket.kind == "tcp"):
            if ticket.kind == collective_plan.KIND:
                continue
            if self._wanted in ("auto", ticket.kind) and ticket not in self._open and ticket not in self._failed:
                if ticket.kind == "tcp" and self._is_near(ticket.rank):
                    continue
                self._try(ticket)
        self.broadcasts.renew(tickets, near=[rank for rank in range(num_sources) if self._is_near(rank)])
        for rank in range(num_sources):
            self._choose(rank, [ticket for ticket in tickets if ticket.rank == rank], version)
        return {rank: choice.kind for rank, choice in self._choices.items() if choice.kind != "zmq"}

    def _is_near(self, rank: int) -> bool:
        """Whether memory of the source is open that no network lies before: then nobody needs a link to it."""
        return any(ticket.rank == rank and ticket.kind in ("shared_memory", "cuda_ipc") for ticket in self._open)

    def _try(self, ticket: Ticket) -> None:
        try:
            if ticket.kind not in KINDS:
                raise ConfigError(f"no such kind of memory: {ticket.kind}")
            module = importlib.import_module(f"weightcast.sync.transports.{ticket.kind}")
            self._open[ticket] = module.reach(ticket.data, self._timeout_s)
        except (ImportError, OSError, WeightcastError) as error:
            # Once a ticket: every version names it again.
            self._failed[ticket] = str(error)

    def _choose(self, rank: int, tickets: Sequence[Ticket], version: Version | None) -> None:
        open_kinds = {ticket.kind for ticket in tickets if ticket in self._open}
        is_near = self._is_near(rank)
        before = self._choices.get(rank)
        failed = {ticket.kind: self._failed[ticket] for ticket in tickets if ticket in self._failed}
        if why := self.broadcasts.find_failure(rank):
            failed[collective_plan.KIND] = why
        context = Context(
            same_host=is_near,
            same_uid=is_near,
            same_gpu="cuda_ipc" in open_kinds,
            rates=self._rates,
            current=None if before is None else before.kind,
            failed=failed,
            num_engines=self.broadcasts.count_engines(rank),
            wanted=self._wanted,
        )
        offers = Offers({ticket.kind for ticket in tickets}, open_kinds | {"zmq", collective_plan.KIND})
        choice = self._choices[rank] = self._settle(rank, offers, context, version)
        if before is None or choice.kind != before.kind:
            logger.info("from source rank %d by %s", rank, choice)

    def _settle(self, rank: int, offers: Offers, context: Context, version: Version | None) -> Choice:
        """The choice, or, where it is a broadcast and this version does not come so, the next best.

        A version is taken from a broadcast also where another way was chosen: this engine is in its group still.
        """
        choice = choose_reach(offers, context)
        broadcast: Kind = "collective"
        is_wanted = choice.kind == broadcast
        if self.broadcasts.settle(rank, version, is_wanted):
            return choice if is_wanted else Choice(broadcast, f"for the last time, then {choice}")
        if not is_wanted:
            return choice
        others = Offers(offers.tickets - {broadcast}, offers.usable)
        instead = choose_reach(others, replace(context, wanted="auto"))
        return Choice(instead.kind, f"{instead.reason} (not broadcast: {self.broadcasts.explain(rank)})")

    def note_rate(self, kind: str, num_bytes: int, seconds: float) -> None:
        """A version that came by one kind took so long; what a broadcast did not bring took it so long too."""
        if collective_plan.KIND in kind.split("+"):
            kind = collective_plan.KIND
        rate = blend_rate(self._rates.get(kind), num_bytes, seconds)
        if rate is not None:
            self._rates[kind] = rate

    def _is_chosen(self, ticket: Ticket) -> bool:
        choice = self._choices.get(ticket.rank)
        return choice is not None and choice.kind == ticket.kind

    def get(self, rank: int) -> Reach | None:
        """A source's memory, of the kind that was chosen."""
        for ticket, reach in self._open.items():
            if ticket.rank == rank and self._is_chosen(ticket) and not isinstance(reach, TcpLink):
                return reach
        return None

    @property
    def links(self) -> dict[int, TcpLink]:
        """Open links by their source's rank; those that are not chosen may still bring what they were asked for."""
        return {ticket.rank: reach for ticket, reach in self._open.items() if isinstance(reach, TcpLink)}

    def give_up(self, rank: int, reason: str) -> None:
        """Let go of a source's memory, and do not try these tickets again; links are tried a few times more."""
        for ticket in [ticket for ticket in self._open if ticket.rank == rank]:
            self._losses[ticket] = self._losses.get(ticket, 0) + 1
            if ticket.kind != "tcp" or self._losses[ticket] >= _MAX_LOSSES:
                self._failed[ticket] = reason
            self._open.pop(ticket).close()

    def close(self) -> None:
        """Let go of everything."""
        for reach in self._open.values():
            reach.close()
        self._open.clear()
        self.broadcasts.close()
