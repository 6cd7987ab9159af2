"""Rosters: who takes part in the broadcasts of one generation, and what each offers. Pure.

A roster is made by source rank 0 and names every member; a group is built of exactly these. When a member is lost the
groups are of no use any more, and the next roster, one generation later, is made of those that are left.

    roster = Roster(generation=1, sources=(0, 1), engines=("engine-0", "engine-1"))
    roster.group_ranks()                 # source 0's group: {"source-0": 0, "engine-0": 1, "engine-1": 2}
    roster.without({"engine-1"})         # generation 2

An engine here is one receiving process. The workers of an engine that receives by its own rules (vLLM, SGLang) have
consecutive ranks from an offset on: `assign_rank_offsets`.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from weightcast.sync import schema
from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.records import REGION, SPEC, VERSION
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.schema import checked, many, text, uint
from weightcast.sync.version import Version

MAX_MEMBERS = 1 << 16


def source_name(rank: int) -> str:
    """How a source is called among the members."""
    return f"source-{rank}"


@dataclass(frozen=True, slots=True)
class Roster:
    """The members of one generation: ranks of sources, ascending, and names of engines, in the order of their ranks."""

    generation: int = checked(uint())
    sources: tuple[int, ...] = checked(many(uint(MAX_MEMBERS), MAX_MEMBERS))
    engines: tuple[str, ...] = checked(many(text, MAX_MEMBERS))

    def __post_init__(self) -> None:
        names = self.names()
        if len(set(names)) != len(names) or list(self.sources) != sorted(self.sources):
            raise ConfigError(f"a roster with members twice, or sources out of order: {names[:20]}; name each once")

    def names(self) -> tuple[str, ...]:
        """All members, sources first."""
        return (*map(source_name, self.sources), *self.engines)

    def without(self, lost: Set[str]) -> "Roster":
        """The next generation, of those that are left. `ConfigError` when no source or no engine is."""
        sources = tuple(rank for rank in self.sources if source_name(rank) not in lost)
        engines = tuple(name for name in self.engines if name not in lost)
        if not sources or not engines or 0 not in sources:
            raise ConfigError(
                f"without {sorted(lost)} there are the sources {sources} and the engines {engines}: too few for a "
                "broadcast, which needs an engine and source rank 0; start the ones that are missing again"
            )
        return Roster(self.generation + 1, sources, engines)

    def next(self) -> "Roster":
        """The next generation, of the same members."""
        return replace(self, generation=self.generation + 1)


def assign_rank_offsets(workers: Mapping[str, int], first_rank: int = 1) -> tuple[dict[str, int], int]:
    """For engines with so many `workers` each, the rank of each engine's first worker, and the size of the group.

    vLLM and SGLang put worker w of an engine at `rank_offset + w`. Several engines in one group need offsets that
    follow each other; the trainer's sender has rank 0.
    """
    offsets: dict[str, int] = {}
    rank = first_rank
    for engine, count in workers.items():
        if count < 1:
            raise ConfigError(f"engine {engine!r} has {count} workers; give the product of its parallel sizes, >= 1")
        offsets[engine] = rank
        rank += count
    if not offsets:
        raise ConfigError("no engine was given; a group needs one at least")
    return offsets, rank


@dataclass(frozen=True, slots=True)
class Offer:
    """What a source holds, and how it cuts it; `specs` is the whole model on source rank 0, and empty on others.

    `epoch` is source rank 0's: the sources of one model publish under one.
    """

    rank: int = checked(uint(MAX_MEMBERS))
    world_size: int = checked(uint(MAX_MEMBERS))
    epoch: int = checked(uint())
    model: str = checked(text)
    chunk_bytes: int = checked(uint(1 << 40))
    bucket_bytes: int = checked(uint(1 << 40))
    specs: tuple[TensorSpec, ...] = checked(many(SPEC))
    regions: tuple[Region, ...] = checked(many(REGION))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a version on an engine; `error` is empty where it is staged and verified."""

    engine: str = checked(text)
    num_bytes: int = checked(uint())
    stage_s: float = checked(schema.real)
    error: str = checked(text)


@dataclass(frozen=True, slots=True)
class Begin:
    """Source rank 0 is about to broadcast a version."""

    version: Version = checked(VERSION)


@dataclass(frozen=True, slots=True)
class Done:
    """A source has read every engine's outcome."""


@dataclass(frozen=True, slots=True)
class Will:
    """An engine that follows a publisher says whether it wants the next versions by broadcast (`collective_plan.py`).

    `insists` is for one whose user asked for nothing else; `after` is the last generation that broke before its eyes,
    without which nobody would know that it still answers.
    """

    name: str = checked(text)
    willing: bool = checked(schema.boolean)
    insists: bool = checked(schema.boolean)
    after: int = checked(uint())


Message: TypeAlias = Roster | Offer | Outcome | Begin | Done | Will
KINDS: dict[str, type[Any]] = {cls.__name__: cls for cls in (Roster, Offer, Outcome, Begin, Done, Will)}
Kind = TypeVar("Kind", bound=Message)


def encode(message: Message) -> bytes:
    """A message as bytes for the store."""
    return schema.pack(type(message).__name__, message)


def decode(raw: bytes, kind: type[Kind]) -> Kind:
    """The message in `raw`, which must be a `kind`; `WireError` when it is anything else."""
    try:
        message = schema.unpack(raw, KINDS)
    except ConfigError as error:
        raise WireError(str(error)) from None
    if not isinstance(message, kind):
        raise WireError(f"a {kind.__name__} was expected, got a {type(message).__name__}")
    return message
