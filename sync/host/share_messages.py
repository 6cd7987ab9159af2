"""What the workers that share a copy say to each other.

follower -> leader    Join, Take, GiveBack
leader -> follower    Boxes, Joined | OtherModel, Offered, Withdrawn, Refused, Granted | Denied, Moved

Descriptors come with `Join` (a file of the boxes that are wanted, where it is not all of the model), `Boxes` (one of
those that lie in the arena) and `Joined` (of the arena, once there is one).
"""

from dataclasses import dataclass
from typing import Any

from weightcast.sync.host.arena import MAX_ARENA_BYTES
from weightcast.sync.host.pool import Staged
from weightcast.sync.schema import checked, optional, real, record, text, uint
from weightcast.sync.version import Version

_VERSION = record(Version, uint(), uint())
_STAGED = record(Staged, _VERSION, uint())


@dataclass(frozen=True, slots=True)
class Join:
    """A worker wants to follow; `model` is `version.fingerprint` of its specs."""

    model: str = checked(text)


@dataclass(frozen=True, slots=True)
class Boxes:
    """What lies in the arena is not all of the model; comes before `Joined`."""


@dataclass(frozen=True, slots=True)
class Joined:
    """It does; what is staged now, if anything. Without an arena `num_bytes` is 0: `Moved` comes when there is one."""

    num_bytes: int = checked(uint(MAX_ARENA_BYTES))
    offered: Staged | None = checked(optional(_STAGED))


@dataclass(frozen=True, slots=True)
class OtherModel:
    """It cannot: the leader's tensors are others."""

    model: str = checked(text)


@dataclass(frozen=True, slots=True)
class Offered:
    """A version is staged, and leases are given for it."""

    staged: Staged = checked(_STAGED)


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The staged version is to be overwritten; no more leases."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What is received from now on lies in another arena: join again for that. Nothing is offered here any more."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The leader will not have this version, and so nobody who follows it."""

    version: Version = checked(_VERSION)
    reason: str = checked(text)


@dataclass(frozen=True, slots=True)
class Take:
    """A follower asks for a lease on the copy in the state `state`."""

    state: int = checked(uint())
    request: int = checked(uint())


@dataclass(frozen=True, slots=True)
class Granted:
    """It has it, and has `lease_s` seconds at least from when the copy is to be overwritten."""

    request: int = checked(uint())
    lease_s: float = checked(real)


@dataclass(frozen=True, slots=True)
class Denied:
    """That state is no longer on offer."""

    request: int = checked(uint())


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The follower's lease ends."""


TO_LEADER: dict[str, type[Any]] = {"join": Join, "take": Take, "give_back": GiveBack}
TO_FOLLOWER: dict[str, type[Any]] = {
    "boxes": Boxes,
    "joined": Joined,
    "other_model": OtherModel,
    "offered": Offered,
    "withdrawn": Withdrawn,
    "refused": Refused,
    "granted": Granted,
    "denied": Denied,
    "moved": Moved,
}
KINDS = {cls: kind for kind, cls in (TO_LEADER | TO_FOLLOWER).items()}
