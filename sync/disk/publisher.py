"""The publisher of a store of versions: what a trainer rank holds to write them.

    with DiskPublisher(bridge.weight_source(model), "/shared/versions") as publisher:     # or "s3://bucket/versions"
        for step in range(1, steps + 1):
            train()
            report = publisher.publish(version=step)

Every rank of the model makes one on the same store. Each writes the files of its own regions; rank 0 writes the
manifest when all parts are there, and with it the version exists. No collective is issued and no socket opened.
`publish` keeps this rank's share in host memory (one extra copy of that share), against which deltas are found.
"""

import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from weightcast.sync.checkpoint_files import INDEX_FILE
from weightcast.sync.disk.catalog import Catalog
from weightcast.sync.disk.extra_files import find_extra_files
from weightcast.sync.disk.fleet_records import FLEET, terms_of
from weightcast.sync.disk.manifest_checks import ModelLimits, check_manifest
from weightcast.sync.disk.meeting import Meeting
from weightcast.sync.disk.naming import MANIFEST, version_folder
from weightcast.sync.disk.packing import DELTA_MAX_SHARE, HostCopy
from weightcast.sync.disk.parts import PartSettings, drop_unused, make_hf_index, merge_parts, write_part
from weightcast.sync.disk.pruning import prune, sweep
from weightcast.sync.disk.records import MAX_TENSORS, Base, Begin, Hashing, Part, StoredFile, VersionManifest, seal
from weightcast.sync.disk.reports import DiskReport, add_outcome, make_report
from weightcast.sync.disk.routes import Chain, Held, needs_anchor
from weightcast.sync.disk.store import Store, open_store
from weightcast.sync.disk.store_fleet import StoreFleet, check_outcome
from weightcast.sync.errors import ConfigError, SourceError, VersionError, WireError
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.regions import check_unique_names
from weightcast.sync.schema import MAX_UINT
from weightcast.sync.source import WeightSource
from weightcast.sync.version import Version

DeltaMode = Literal["auto", "on", "off", "zstd"]
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_FILE_BYTES = 1 << 30
_DELTA_FILE_BYTES = 256 << 20
DEFAULT_LOST_AFTER_S = 10.0
_MIN_FILE_BYTES = 1 << 12
_OUTCOME_GRACE_S = 5.0  # rank 0 keeps the deadline and says who missed it; other ranks only outlast a dead rank 0


class DiskPublisher:
    """See the module.

    `delta`: "auto" writes deltas between anchors where they are smaller than half of the weights; "on" writes them
    whatever they take; "zstd" is "auto" with entropy coding, for slow links; "off" makes every version an anchor.
    `anchor_every`: at least every so many versions is an anchor, and one follows when the deltas since the last have
    half the model's bytes. `keep` newest versions stay, with all that they need; older ones are removed. `config_from`
    is a folder whose configuration and tokenizer go into every anchor. `key`: 16 to 64 bytes that every rank and every
    engine must have; then nobody else can make or alter a version. `timeout_s` bounds every wait.

    With a `policy` engines agree (`sync/fleet.py`, by files alone): they say what they have staged, none is given a
    version before enough have, and `publish` returns when the fleet serves it; an engine silent for `lost_after_s` is
    fenced. Without one, each engine takes a version when it is whole. Every rank is given the same.

    Raises `ConfigError` for settings out of range, `SourceError` when tensor names repeat.
    """

    def __init__(
        self,
        source: WeightSource,
        place: "str | Path | Store",
        *,
        delta: DeltaMode = "auto",
        anchor_every: int = 25,
        keep: int = 5,
        file_bytes: int = DEFAULT_FILE_BYTES,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        config_from: Path | None = None,
        key: bytes | None = None,
        epoch: int | None = None,
        policy: FleetPolicy | None = None,
        lost_after_s: float = DEFAULT_LOST_AFTER_S,
    ) -> None:
        _check_settings(delta, anchor_every, keep, file_bytes, lost_after_s)
        self._source = source
        self._specs = tuple(source.specs())
        check_unique_names(self._specs)
        self._model_bytes = sum(spec.num_bytes for spec in self._specs)
        self._delta, self._anchor_every, self._keep, self._timeout_s = delta, anchor_every, keep, timeout_s
        if config_from is not None:
            find_extra_files(config_from)  # a wrong folder is refused now, not at the first anchor
        self._config_from = config_from
        self._hashing = Hashing(key)
        self._settings = PartSettings(
            self._hashing, file_bytes, min(file_bytes, _DELTA_FILE_BYTES), entropy_code=delta == "zstd"
        )
        self._store = open_store(place)
        # Its own versions are read back for their sizes alone; what the model takes is this host's business already.
        self._limits = ModelLimits(MAX_UINT, MAX_TENSORS)
        self._catalog = Catalog(self._store, self._hashing, self._limits)
        self._terms = None if policy is None else terms_of(policy, lost_after_s)
        self._meeting = Meeting(source, self._store, self._hashing, epoch, self._terms)
        self._fleet = None if policy is None else StoreFleet(self._store, self._hashing, policy, lost_after_s)
        self._copy: HostCopy | None = None
        self._last_number = -1
        self._held: Version | None = None  # whose bits the copy has, exactly
        self._last: Held | None = None  # the last version of this life, on rank 0
        self._chain: Chain | None = None
        self._delta_loses = False

    @property
    def place(self) -> str:
        """The folder or URL."""
        return self._store.url

    @property
    def epoch(self) -> int:
        """This publisher's life; -1 until the first publish."""
        return self._meeting.epoch

    def fleet(self) -> tuple[EngineStatus, ...]:
        """The engines that agree, as they are now; empty without a policy, and on other ranks than 0."""
        return () if self._fleet is None or self._meeting.rank != 0 else self._fleet.look()

    def wait_for_subscribers(self, count: int, timeout_s: float | None = None) -> None:
        """Wait until `count` engines of the fleet follow this store. Every rank calls; rank 0 waits.

        Raises `DeadlineExceeded` with those that are there, `ConfigError` without a policy: engines are not known then.
        """
        if self._fleet is None:
            raise ConfigError(
                f"engines that follow {self.place} are not known to their publisher: give it a policy "
                "(FleetPolicy.all()), or do not wait for them"
            )
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        self._join(deadline_s)
        if self._meeting.rank == 0:
            self._fleet.wait_for(count, deadline_s)

    def _join(self, deadline_s: float) -> HostCopy:
        if self._copy is None:
            self._meeting.join(deadline_s)
            self._copy = HostCopy(self._source, self._meeting.regions)
        return self._copy

    def publish(self, version: int, *, timeout_s: float | None = None) -> DiskReport:
        """Write the weights as they are now. Every rank must call, with one number, which must rise (gaps are fine).

        When it returns, the version is whole and durable, and with a policy the fleet serves it. After an error it does
        not exist, the earlier ones are as they were, and the next publish (a higher number) makes an anchor. Raises
        `StorageError` for a full disk or a refused write, `VersionError` when the number does not rise or a later
        publisher has taken over, `DeadlineExceeded` or `PeerLost` when another rank did not do its part, `SourceError`
        when the ranks do not hold a whole model together.

        With a policy also `DeadlineExceeded` and `EngineError` with the engines that have not staged, do not serve or
        refused the version, which then lies there whole; deltas go on from it.
        """
        if not 0 <= version <= MAX_UINT or version <= self._last_number:
            raise VersionError(
                f"version {version} does not rise above {self._last_number}; "
                "versions are integers >= 0 and each publish takes a higher one, also after one that failed"
            )
        started_s = time.monotonic()
        deadline_s = started_s + (self._timeout_s if timeout_s is None else timeout_s)
        copy = self._join(deadline_s)
        self._last_number = version
        begin = self._begin(version, deadline_s)
        try:
            report = self._publish(begin, copy, started_s, deadline_s)
        except BaseException as error:
            self._held = self._last = self._chain = None
            self._meeting.report_failure(begin.version, f"{type(error).__name__}: {error}")
            raise
        return self._agree(begin.version, report, deadline_s)

    def _agree(self, version: Version, report: DiskReport, deadline_s: float) -> DiskReport:
        """Wait for the fleet, where there is one; the version itself is written."""
        if self._meeting.rank != 0:
            if not self._meeting.has_fleet():
                return report
            outcome = self._meeting.await_outcome(version, deadline_s + _OUTCOME_GRACE_S)
        elif self._fleet is None:
            return report
        else:
            assert self._last is not None
            outcome = self._fleet.agree(self._last, deadline_s, self._meeting.check_fence)
            if self._meeting.world_size > 1:
                self._fleet.tell(outcome)
        check_outcome(outcome, report.place)
        return add_outcome(report, outcome)

    def _begin(self, number: int, deadline_s: float) -> Begin:
        """Rank 0 decides, and the others learn, whether this is an anchor and what a delta would be upon."""
        if self._meeting.rank != 0:
            return self._meeting.await_begin(number, deadline_s)
        self._meeting.check_fence()
        sweep(self._catalog, self._meeting.epoch)
        anchor = self._delta == "off" or needs_anchor(self._chain, self._anchor_every, self._model_bytes)
        anchor = anchor or (self._delta_loses and self._delta != "on")
        base = None if self._last is None or self._delta == "off" else self._last.version
        begin = Begin(Version(self._meeting.epoch, number), anchor, base)
        self._meeting.open_version(begin)
        return begin

    def _publish(self, begin: Begin, copy: HostCopy, started_s: float, deadline_s: float) -> DiskReport:
        has_base = begin.base is not None and self._held == begin.base
        self._held = None
        part = write_part(self._store, begin, copy, self._meeting.rank, self._settings, has_base)
        if self._meeting.rank == 0:
            parts = self._meeting.gather(part, deadline_s)
            manifest = self._commit(begin, parts)
            removed = prune(self._catalog, begin.version, self._keep, is_governed=self._fleet is not None)
        else:
            self._meeting.submit(part, deadline_s)
            parts, manifest, removed = [part], None, ()
        self._held = begin.version
        phases_s = {"pack": part.pack_s, "write": part.write_s}
        phases_s["meet"] = max(0.0, time.monotonic() - started_s - sum(phases_s.values()))
        place = f"{self.place}/{version_folder(begin.version)}"
        started_at_s = time.time() - (time.monotonic() - started_s)
        return make_report(begin, place, self._specs, parts, manifest, has_base, phases_s, removed, started_at_s)

    def _commit(self, begin: Begin, parts: list[Part]) -> VersionManifest:
        """Rank 0: all other files, then the manifest, which makes the version exist."""
        folder = version_folder(begin.version)
        base = None
        if begin.base is not None:
            assert self._last is not None
            base = Base(self._last.version, self._last.seal)
        manifest = merge_parts(begin, base, self._specs, self._meeting.shares, parts, self._hashing)
        manifest, unused = drop_unused(manifest)
        try:
            check_manifest(manifest, begin.version, self._hashing, self._limits)
        except WireError as error:
            raise SourceError(f"the parts of version {begin.version} do not make a whole: {error}") from error
        if begin.is_anchor:
            manifest = replace(manifest, files=manifest.files + self._write_extras(folder, manifest))
        if self._terms is not None:
            raw_terms = seal(self._terms, self._hashing)
            self._store.write(folder, FLEET, [raw_terms])
            terms = StoredFile(FLEET, len(raw_terms), self._hashing.of(raw_terms))
            manifest = replace(manifest, files=(*manifest.files, terms))
        self._store.remove(folder, unused)
        self._meeting.check_fence()
        raw = seal(manifest, self._hashing)
        self._store.write(folder, MANIFEST, [raw])
        self._remember(manifest, Held(begin.version, self._hashing.of(raw)))
        return manifest

    def _write_extras(self, folder: str, manifest: VersionManifest) -> tuple[StoredFile, ...]:
        """What makes an anchor an ordinary HF folder, where it is one: configuration, tokenizer, index."""
        extras = {} if self._config_from is None else find_extra_files(self._config_from)
        if (index := make_hf_index(manifest)) is not None:
            extras[INDEX_FILE] = index
        for name, data in extras.items():
            self._store.write(folder, name, [data])
        return tuple(StoredFile(name, len(data), self._hashing.of(data)) for name, data in extras.items())

    def _remember(self, manifest: VersionManifest, last: Held) -> None:
        delta_bytes = sum(piece.num_bytes for piece in manifest.delta)
        if manifest.base is not None:
            self._delta_loses = delta_bytes > DELTA_MAX_SHARE * self._model_bytes
        else:
            # An anchor whose delta did not pay: the next is an anchor too, and will tell.
            self._delta_loses = self._last is not None and self._delta != "off"
        self._last = last
        if manifest.is_anchor or self._chain is None:
            self._chain = Chain(0, 0)
        else:
            self._chain = Chain(self._chain.num_versions + 1, self._chain.delta_bytes + delta_bytes)

    def close(self) -> None:
        """Let go of the store; what is written stays."""
        self._store.close()
        self._copy = None

    def __enter__(self) -> "DiskPublisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_settings(delta: str, anchor_every: int, keep: int, file_bytes: int, lost_after_s: float) -> None:
    if not lost_after_s > 0:
        raise ConfigError(f"lost_after_s={lost_after_s} must be seconds above 0")
    if delta not in get_args(DeltaMode):
        raise ConfigError(f"delta={delta!r} is unknown; choose one of {', '.join(get_args(DeltaMode))}")
    if anchor_every < 1 or keep < 1 or file_bytes < _MIN_FILE_BYTES:
        raise ConfigError(
            f"anchor_every={anchor_every} and keep={keep} must be at least 1, file_bytes={file_bytes} at least "
            f"{_MIN_FILE_BYTES}"
        )
