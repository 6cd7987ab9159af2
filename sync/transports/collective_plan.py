"""Broadcasts of a publisher's versions: who takes part in which, when groups are built anew, when to give up. Pure.

Every source has a group of its own, with a store in which engines say whether they will take part. At the border of a
version, and at no other time, the source decides by what it knows then:

    decision = decide(standing, members, Border(is_whole=True))
    decision.generation                  # 0: not broadcast, and `why`; else the group's, which may be a new one

and tells the engines in the announcement's ticket. A broadcast is an offer: whoever is not in the group, and whatever
does not come, asks the source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from weightcast.sync import schema
from weightcast.sync.errors import WireError
from weightcast.sync.schema import checked, real, text, uint
from weightcast.sync.transports.choose import MIN_ENGINES
from weightcast.sync.transports.collective_buckets import DEFAULT_BUCKET_BYTES, BucketPlan, plan_buckets
from weightcast.sync.transports.collective_roster import Will
from weightcast.sync.version import Version

KIND = "collective"
NCCL_KIND = "collective_nccl"
"""What `expose` calls broadcasts over NCCL; to engines both are `KIND`."""
# From when the first engine of a group has come for a version, or the groups are being built.
GATHER_S = 5.0
# A broadcast may take this long whatever it brings, and
_LEAST_S = 60.0
# so much longer as a link has that nobody would build groups for.
_SLOWEST_BYTES_PER_S = 50e6


@dataclass(frozen=True, slots=True)
class BroadcastTicket:
    """What a source says of its broadcasts in an announcement.

    The store is at `host` and `port`; members are lost after `lost_after_s` of silence. The version is broadcast in
    `generation`, or, where that is 0, not at all, for the reason `why`. `num_engines` could take part in the next ones.
    """

    host: str = checked(text)
    port: int = checked(uint(65535))
    backend: str = checked(schema.choice("gloo", "nccl"))
    lost_after_s: float = checked(real)
    generation: int = checked(uint())
    num_engines: int = checked(uint())
    why: str = checked(text)

    @property
    def address(self) -> str:
        """Of the store, as `Rendezvous` takes it."""
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def pack_ticket(ticket: BroadcastTicket) -> bytes:
    """A ticket's bytes."""
    return schema.pack(BroadcastTicket.__name__, ticket)


def read_ticket(data: bytes) -> BroadcastTicket:
    """The ticket in `data`; `WireError` when it is malformed."""
    ticket: BroadcastTicket = schema.unpack(data, {BroadcastTicket.__name__: BroadcastTicket})
    if not 0 < ticket.lost_after_s <= 86400:
        raise WireError(f"a ticket to broadcasts whose members are lost after {ticket.lost_after_s:g} s")
    return ticket


@dataclass(frozen=True, slots=True)
class Standing:
    """What a source has: the last generation and its engines, the last one that broke, whether one is under way."""

    generation: int = 0
    engines: tuple[str, ...] = ()
    broken: int = 0
    is_busy: bool = False


@dataclass(frozen=True, slots=True)
class Border:
    """What a source knows of the version that begins."""

    is_whole: bool = True
    """Its chunks are sent as they are, from memory that they were copied to."""
    num_chunks: int = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """How a version goes: by broadcast in `generation` to `engines`; or, with 0, on request alone, and `why`."""

    generation: int = 0
    engines: tuple[str, ...] = ()
    why: str = "no version was announced yet"


def decide(standing: Standing, members: Sequence[Will], border: Border) -> Decision:
    """Whether a version is broadcast, and to whom. `members` are those that show signs of life.

    After a generation broke, those who have not said anything since are left out: they may be what broke it.
    """
    if not border.num_chunks:
        return Decision(why="this source serves nothing")
    if not border.is_whole:
        return Decision(why="it goes as what changed, or is read where it lies")
    if standing.is_busy:
        return Decision(why="the version before is still being broadcast")
    willing = [member for member in members if member.willing and member.after >= standing.broken]
    if len(willing) < MIN_ENGINES and not any(member.insists for member in willing):
        return Decision(why=f"{len(willing)} engines are willing, {MIN_ENGINES} are needed")
    names = tuple(sorted(member.name for member in willing))
    is_sound = standing.generation > standing.broken and names == standing.engines
    return Decision(standing.generation + (not is_sound), names, "")


def takes_part(
    ticket: BroadcastTicket, version: Version, generation: int, is_willing: bool, last: Version | None
) -> bool:
    """Whether an engine that is in the group of `generation` (0: of none) waits for the broadcast of `version`.

    The group is one whose every member receives, whatever it will do next. Who has said that it is willing may be in a
    newer one; `last` was received last.
    """
    if not ticket.generation or (last is not None and version <= last):
        return False
    return ticket.generation == generation or (is_willing and ticket.generation > generation)


def has_gathered(num_come: int, num_engines: int, waited_s: float | None) -> bool | None:
    """Whether all engines have come for a version; None when the rest is not waited for any longer.

    `waited_s` counts from when the first came (None before: engines come once every source has begun the version).
    """
    if num_come >= num_engines:
        return True
    return None if waited_s is not None and waited_s > GATHER_S else False


def broadcast_limit_s(num_bytes: int) -> float:
    """How long a broadcast may take at most. That it goes on at all is watched more closely."""
    return _LEAST_S + num_bytes / _SLOWEST_BYTES_PER_S


def plan_broadcast(chunk_sizes: Sequence[int]) -> BucketPlan:
    """The buckets of a source's share: the same on both ends."""
    return plan_buckets(chunk_sizes, max(DEFAULT_BUCKET_BYTES, max(chunk_sizes, default=0)))
