"""A source that broadcasts whole versions by itself, without the publisher: staged and verified on every engine.

    with CollectiveSource(source, "tcp://10.0.0.1:5700", engines=("engine-0", "engine-1")) as sender:   # on each rank
        report = sender.broadcast(version=1)

Every source broadcasts its own share at the same time as the others, straight out of the live parameters, two buckets
at a time; the call returns when every engine has staged the version and found its digests right. Until then the
parameters must not change. Nothing waits longer than `timeout_s`: an engine that died, was stopped or is too slow makes
`broadcast` raise on every source, with the groups closed; `rebuild` builds them anew over those that are left.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType

from weightcast.sync.chunks import DEFAULT_CHUNK_BYTES
from weightcast.sync.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    PeerLost,
    VersionError,
    WeightcastError,
)
from weightcast.sync.source import WeightSource
from weightcast.sync.transports.collective_backend import check_backend
from weightcast.sync.transports.collective_buckets import DEFAULT_BUCKET_BYTES
from weightcast.sync.transports.collective_group import LiveGroups, Rendezvous
from weightcast.sync.transports.collective_layout import CollectiveLayout, make_layout, make_offer
from weightcast.sync.transports.collective_roster import Begin, Done, Offer, Outcome, Roster, source_name
from weightcast.sync.transports.collective_sender import BucketSender
from weightcast.sync.transports.collective_staging import RegionPacker
from weightcast.sync.version import Version, new_epoch

DEFAULT_TIMEOUT_S = 300.0
DEFAULT_LOST_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class CollectiveReport:
    """What became of a version. `num_bytes` is this source's share; `seconds` has `send` and `confirm`."""

    version: Version
    generation: int
    num_bytes: int
    num_buckets: int
    seconds: dict[str, float]
    engines: tuple[Outcome, ...]


class CollectiveSource(AbstractContextManager["CollectiveSource"]):
    """One rank of a model's sources. Every rank of the model must make one, and call the same methods.

    `address` is where rank 0 listens, `tcp://host:port`; with port 0 it takes a free one, and `self.address` is what
    the others need. `engines` are the names of the receiving processes; only rank 0's are read. Methods block, and are
    for one thread.
    """

    def __init__(
        self,
        source: WeightSource,
        address: str,
        *,
        engines: Sequence[str] = (),
        backend: str = "gloo",
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        lost_after_s: float = DEFAULT_LOST_AFTER_S,
    ) -> None:
        self._source = source
        self._name = source_name(source.rank)
        self._backend = check_backend(backend)
        self._timeout_s = timeout_s
        self._offer = make_offer(source, chunk_bytes, bucket_bytes, new_epoch())
        self._live: LiveGroups | None = None
        self._layout: CollectiveLayout | None = None
        self._packer: RegionPacker | None = None
        self._number = -1
        self.lost: tuple[str, ...] = ()
        """The members that were lost when `broadcast` failed last."""
        if source.rank == 0 and not engines:
            raise ConfigError("source rank 0 was given no engines; name the processes that will receive")
        self._roster = Roster(1, tuple(range(source.world_size)), tuple(engines))
        enter = Rendezvous.host if source.rank == 0 else Rendezvous.join
        self._rendezvous = enter(address, self._name, timeout_s=timeout_s, lost_after_s=lost_after_s)
        self.address = self._rendezvous.address

    @property
    def generation(self) -> int:
        """The generation of the groups; it rises with every rebuilding."""
        return self._roster.generation

    def connect(self, timeout_s: float | None = None) -> None:
        """Meet all members. Called by the first `broadcast`. `DeadlineExceeded` names those that are missing."""
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        rendezvous = self._rendezvous
        rendezvous.put(f"offer/{self._name}", self._offer)
        if rendezvous.is_host:
            rendezvous.propose(self._roster)
        else:
            self._roster = rendezvous.await_roster(self._roster.generation - 1, deadline)
        self._layout = read_layout(rendezvous, self._roster, deadline)
        layout, rank = self._layout, self._source.rank
        self._packer = RegionPacker(layout.regions[rank], self._source.held(), layout.dtypes, layout.chunks[rank])
        self._live = rendezvous.meet(self._roster, self._backend, deadline)

    def broadcast(self, version: int, timeout_s: float | None = None) -> CollectiveReport:
        """Send version number `version`, which must rise; every source must call, with the same number.

        Raises `PeerLost` when a member is lost and `DeadlineExceeded` after `timeout_s`, both with the groups closed;
        `EngineError` when an engine refused what it got, with the groups as they were.
        """
        if version <= self._number:
            raise VersionError(f"version {version} does not rise above {self._number}; versions only rise")
        if self._live is None:
            self.connect(timeout_s)
        live, layout = self._live, self._layout
        assert live is not None and layout is not None
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        self._number = version
        full = Version(layout.epoch, version)
        try:
            return self._broadcast(full, live, layout, deadline)
        except EngineError:
            raise
        except (PeerLost, DeadlineExceeded) as error:
            self._give_up(live, str(error))
            raise type(error)(self._explain(full, error)) from error
        except BaseException as error:
            self._give_up(live, f"{type(error).__name__}: {error}", look=False)
            raise

    def _broadcast(
        self, version: Version, live: LiveGroups, layout: CollectiveLayout, deadline: float
    ) -> CollectiveReport:
        rank = self._source.rank
        plan = layout.plans[rank]
        if self._rendezvous.is_host:
            self._rendezvous.put(f"begin/{self.generation}", Begin(version))
        packer = self._packer
        assert packer is not None
        packer.begin()
        sender = BucketSender(live.groups[rank], rank, self.generation)
        start_s = time.monotonic()
        sender.send(version, plan, packer.pack, deadline, live.watch, packer.digests)
        sent_s = time.monotonic()
        outcomes = self._confirm(version, live, deadline)
        seconds = {"send": sent_s - start_s, "confirm": time.monotonic() - sent_s}
        if refused := [f"{outcome.engine}: {outcome.error}" for outcome in outcomes if outcome.error]:
            raise EngineError(
                f"version {version} was refused by {'; '.join(refused)}. These engines keep what they had: broadcast "
                "the next version, or find out why their bytes were altered"
            )
        return CollectiveReport(version, self.generation, plan.num_bytes, len(plan.buckets), seconds, outcomes)

    def _confirm(self, version: Version, live: LiveGroups, deadline: float) -> tuple[Outcome, ...]:
        """Every engine's outcome. The host forgets them when all sources have read them."""
        prefix = f"{self.generation}/{version.number}"
        keys = {engine: f"outcome/{prefix}/{engine}" for engine in self._roster.engines}
        await_all = partial(self._rendezvous.await_all, deadline=deadline, watch=live.watch)
        outcomes = await_all(keys, Outcome, what=f"for engines to stage version {version}")
        others = {source_name(rank): f"done/{prefix}/{rank}" for rank in self._roster.sources if rank != 0}
        if not self._rendezvous.is_host:
            self._rendezvous.put(others[self._name], Done())
            return tuple(outcomes.values())
        await_all(others, Done, what=f"for the other sources to end version {version}")
        for key in (*keys.values(), *others.values()):
            self._rendezvous.drop(key)
        return tuple(outcomes.values())

    def _give_up(self, live: LiveGroups, reason: str, look: bool = True) -> None:
        self._live = None
        live.give_up(reason)
        self.lost = live.find_lost() if look else ()

    def _explain(self, version: Version, error: WeightcastError) -> str:
        who = f"lost: {', '.join(self.lost)}" if self.lost else "all members are alive: some are slow, or refused"
        return (
            f"{self._name} did not bring version {version} to all of {', '.join(self._roster.engines)} in generation "
            f"{self.generation}: {error}; {who}. The groups are closed; call rebuild() on every source and rejoin() on "
            "every engine, or start the lost ones again"
        )

    def rebuild(self, engines: Sequence[str] | None = None, timeout_s: float | None = None) -> Roster:
        """Build the groups anew, one generation later; every source and engine that is left must take part.

        Rank 0 leaves out the members in `self.lost`, or takes `engines` where given: some joined, or came back.
        Raises `ConfigError` when too few are left, `SourceError` when those sources lack a part of the model.
        """
        if self._live is not None:
            self._live.close()
            self._live = None
        roster = self._roster.without(set(self.lost)) if self._rendezvous.is_host else self._roster.next()
        self._roster = roster if engines is None else replace(roster, engines=tuple(engines))
        self.lost = ()
        self.connect(timeout_s)
        return self._roster

    def close(self) -> None:
        """Leave. Rank 0's store goes with it."""
        if self._live is not None:
            self._live.close()
            self._live = None
        self._rendezvous.close()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def read_layout(rendezvous: Rendezvous, roster: Roster, deadline: float) -> CollectiveLayout:
    """The layout that the sources of `roster` offer together, once they all have."""
    keys = {source_name(rank): f"offer/{source_name(rank)}" for rank in roster.sources}
    offers = rendezvous.await_all(keys, Offer, deadline, "for the sources' offers")
    return make_layout({rank: offers[source_name(rank)] for rank in roster.sources})
