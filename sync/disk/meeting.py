"""How the sources of one publisher meet in the store: nothing but files, no collective and no socket.

    rank 0                                        every other rank r
      claims run-<epoch>/, writes run
                                                    finds the newest run, writes joining-<r>
      all there: writes shares ------------------▶  takes its regions
    then, for each version,
      writes begin ------------------------------▶  packs, writes its files, and its part last
      all parts there: writes the manifest -------▶ returns

The newest epoch counts. A source whose run is older than another one in the store is fenced: it raises, and writes no
manifest any more.
"""

import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from weightcast.sync.assignment import assign_regions
from weightcast.sync.disk import naming
from weightcast.sync.disk.fleet_records import FLEET, OUTCOME, FleetTerms, Outcome
from weightcast.sync.disk.records import (
    FORMAT,
    MAX_RECORD_BYTES,
    Begin,
    Failure,
    Hashing,
    Joining,
    Part,
    Run,
    Shares,
    Unfinished,
    seal,
    unseal,
)
from weightcast.sync.disk.store import Store, read_file
from weightcast.sync.errors import (
    DeadlineExceeded,
    PeerLost,
    SourceError,
    StorageError,
    VersionError,
    WeightcastError,
    WireError,
)
from weightcast.sync.regions import Region
from weightcast.sync.source import WeightSource
from weightcast.sync.version import Version, fingerprint, new_epoch

_Found = TypeVar("_Found")
_FIRST_POLL_S = 0.005


class Meeting:
    """One source's membership in a run. `join` first; `epoch` is rank 0's wish, or None; `terms` those of its fleet."""

    def __init__(
        self,
        source: WeightSource,
        store: Store,
        hashing: Hashing,
        epoch: int | None,
        terms: FleetTerms | None = None,
    ) -> None:
        self.epoch = -1
        self._terms = terms
        self.rank, self.world_size = source.rank, source.world_size
        self._specs = tuple(source.specs())
        self._regions = tuple(item.region for item in source.held())
        self._store, self._hashing, self._wish = store, hashing, epoch
        self._life = secrets.token_hex(8)
        self._model = fingerprint(self._specs)
        self.shares: tuple[tuple[Region, ...], ...] = ()
        """The regions that each rank serves; known once it has joined."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """What this source serves."""
        return self.shares[self.rank]

    def join(self, deadline_s: float) -> None:
        """Make or find the run. Raises `DeadlineExceeded`, `VersionError`, `SourceError`, `StorageError`."""
        if self.rank != 0:
            self._wait(self._try_to_join, deadline_s, lambda: f"rank 0 to open a run for {self.world_size} sources")
            return
        epoch = self._claim()
        if self._terms is not None:
            self._write(naming.run_folder(epoch), FLEET, self._terms)  # before what says that the run is there
        self._write(naming.run_folder(epoch), naming.RUN, Run(FORMAT, epoch, self.world_size, self._model))
        self.epoch = epoch
        joined = self._wait(self._find_joined, deadline_s, self._describe_missing)
        holdings = {0: self._regions} | {rank: joining.regions for rank, joining in joined.items()}
        self.shares = tuple(assign_regions(self._specs, holdings).values())
        if self.world_size > 1:
            lives = (self._life, *(joined[rank].life for rank in range(1, self.world_size)))
            self._write(naming.run_folder(epoch), naming.SHARES, Shares(lives, self.shares))

    def _claim(self) -> int:
        newest = self.newest_epoch()
        if self._wish is not None and self._wish <= newest:
            raise VersionError(
                f"epoch {self._wish} does not rise above {newest}, which {self._store.url} has seen; leave it out"
            )
        epoch = self._wish if self._wish is not None else max(new_epoch(), newest + 1)
        while not self._store.claim(naming.run_folder(epoch)):
            epoch += 1
        return epoch

    def newest_epoch(self) -> int:
        """The newest epoch of which the store has a trace; -1: none."""
        names = self._store.folders()
        runs = [epoch for name in names if (epoch := naming.parse_run_folder(name)) is not None]
        versions = [version for name in names if (version := naming.parse_version_folder(name)) is not None]
        return max([*runs, *(version.epoch for version in versions)], default=-1)

    def _joined(self) -> dict[int, Joining]:
        folder = naming.run_folder(self.epoch)
        there = self._store.files(folder)
        joined = {}
        for rank in range(1, self.world_size):
            if naming.joining_file(rank) in there and (found := self._read(folder, naming.joining_file(rank), Joining)):
                joined[rank] = found
        return joined

    def _find_joined(self) -> dict[int, Joining] | None:
        self.check_fence()
        joined = self._joined()
        for rank, joining in joined.items():
            if (joining.rank, joining.world_size, joining.model) != (rank, self.world_size, self._model):
                raise SourceError(
                    f"source rank {rank} says that there are {joining.world_size} sources of model {joining.model}, "
                    f"rank 0 has {self.world_size} of model {self._model}; every rank must list the same specs()"
                )
        return joined if len(joined) == self.world_size - 1 else None

    def _describe_missing(self) -> str:
        missing = sorted(set(range(1, self.world_size)) - self._joined().keys())
        return f"the source ranks {missing} to join; every rank makes a publisher on the same store"

    def _try_to_join(self) -> bool | None:
        newest = max((e for n in self._store.folders() if (e := naming.parse_run_folder(n)) is not None), default=-1)
        folder = naming.run_folder(newest)
        if newest > self.epoch and (run := self._read(folder, naming.RUN, Run)) is not None:
            if (run.world_size, run.model) != (self.world_size, self._model):
                return None  # of an earlier job, or another's; this rank's own run is still to come
            joining = Joining(self.rank, self._life, self.world_size, self._model, self._regions)
            self._write(folder, naming.joining_file(self.rank), joining)
            self.epoch = newest
        if newest < 0 or newest != self.epoch or (shares := self._read(folder, naming.SHARES, Shares)) is None:
            return None
        if self.rank >= len(shares.lives) or shares.lives[self.rank] != self._life:
            return None  # these are an earlier life's
        self.shares = shares.regions
        return True

    def check_fence(self) -> None:
        """Raise `VersionError` when a later publisher has taken over the store."""
        newest = self.newest_epoch()
        if newest > self.epoch:
            raise VersionError(
                f"a publisher of epoch {newest} has taken over {self._store.url}; this one has epoch {self.epoch} and "
                "is fenced: it writes no version any more. End it, or make a new publisher if it should go on"
            )

    def open_version(self, begin: Begin) -> None:
        """Rank 0: let the other sources begin."""
        self.check_fence()
        if self.world_size > 1:
            self._write(naming.version_folder(begin.version), naming.BEGIN, begin)

    def await_begin(self, number: int, deadline_s: float) -> Begin:
        """Other ranks: what rank 0 wants of version `number`."""
        folder = naming.version_folder(Version(self.epoch, number))

        def look() -> Begin | None:
            self.check_fence()
            return self._read(folder, naming.BEGIN, Begin)

        return self._wait(look, deadline_s, lambda: f"rank 0 to begin version {number}; every rank must publish it")

    def submit(self, part: Part, deadline_s: float) -> None:
        """Other ranks: hand in a part, and wait for the manifest."""
        folder = naming.version_folder(part.version)
        self._write(folder, naming.part_file(self.rank), part)

        def look() -> bool | None:
            self._raise_failures(folder)
            self.check_fence()
            return True if naming.MANIFEST in self._store.files(folder) else None

        self._wait(look, deadline_s, lambda: f"rank 0 to finish version {part.version}")

    def gather(self, own: Part, deadline_s: float) -> list[Part]:
        """Rank 0: the parts of all sources, by rank."""
        folder = naming.version_folder(own.version)
        parts = {0: own}

        def look() -> bool | None:
            self._raise_failures(folder)
            there = self._store.files(folder) if self.world_size > 1 else {}
            for rank in set(range(self.world_size)) - parts.keys():
                if naming.part_file(rank) in there and (part := self._read(folder, naming.part_file(rank), Part)):
                    self._check_part(part, own.version, rank)
                    parts[rank] = part
            return True if len(parts) == self.world_size else None

        missing = "the parts of version {} from the source ranks {}"
        self._wait(
            look, deadline_s, lambda: missing.format(own.version, sorted(set(range(self.world_size)) - parts.keys()))
        )
        return [parts[rank] for rank in range(self.world_size)]

    def has_fleet(self) -> bool:
        """Whether rank 0 has a policy, so that its versions have an outcome."""
        return FLEET in self._store.files(naming.run_folder(self.epoch))

    def await_outcome(self, version: Version, deadline_s: float) -> Outcome:
        """Other ranks: what became of a version in the fleet, after its manifest was written."""
        folder = naming.version_folder(version)

        def look() -> Outcome | None:
            return self._read(folder, OUTCOME, Outcome)

        return self._wait(look, deadline_s, lambda: f"rank 0 to say what became of version {version} in the fleet")

    def _check_part(self, part: Part, version: Version, rank: int) -> None:
        if (part.version, part.rank, len(part.digests)) != (version, rank, 8 * len(self.shares[rank])):
            raise SourceError(
                f"the part of source rank {rank} for version {version} says rank {part.rank}, version {part.version} "
                f"and {len(part.digests) // 8} regions of {len(self.shares[rank])}; publish the next version"
            )

    def report_failure(self, version: Version, reason: str) -> None:
        """Tell the other sources that this one failed, where the store still takes so much."""
        folder = naming.version_folder(version)
        try:
            own = [name for name in self._store.files(folder) if f"-r{self.rank:05d}-" in name]
            self._store.remove(folder, own)  # which may make the room for the record
            if self.world_size > 1:
                self._write(folder, naming.failure_file(self.rank), Failure(self.rank, reason[:1000]))
        except (OSError, WeightcastError):
            return  # then the others meet their deadline

    def _raise_failures(self, folder: str) -> None:
        if self.world_size == 1:
            return
        for name in self._store.files(folder):
            if name.startswith("failed-") and (failure := self._read(folder, name, Failure)) is not None:
                raise PeerLost(f"source rank {failure.rank} failed: {failure.reason}")

    def _write(self, folder: str, name: str, rec: object) -> None:
        self._store.write(folder, name, [seal(rec, self._hashing)])

    def _read(self, folder: str, name: str, cls: type[_Found]) -> _Found | None:
        try:
            return unseal(read_file(self._store, folder, name, MAX_RECORD_BYTES + 1024), cls, self._hashing)
        except (FileNotFoundError, NotADirectoryError, Unfinished):
            return None
        except (OSError, WireError) as error:
            raise StorageError(
                f"{self._store.url}/{folder}/{name}, by which a publisher's sources meet, cannot be used: {error}; "
                "give all ranks the same key and a store that nobody else writes to, and start them again"
            ) from error

    def _wait(self, look: Callable[[], _Found | None], deadline_s: float, describe: Callable[[], str]) -> _Found:
        started_s = time.monotonic()
        pause_s = _FIRST_POLL_S
        while (found := look()) is None:
            now_s = time.monotonic()
            if now_s >= deadline_s:
                raise DeadlineExceeded(
                    f"source rank {self.rank} waited {now_s - started_s:.1f} s at {self._store.url} for {describe()}"
                )
            time.sleep(min(pause_s, max(0.0, deadline_s - now_s)))
            pause_s = min(2 * pause_s, self._store.poll_s)
        return found
