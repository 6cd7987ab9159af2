"""What a store of versions holds, for people: `weightcast versions FOLDER [--check]`."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightcast.sync.disk.agreement import read_release
from weightcast.sync.disk.catalog import Catalog, host_limits, is_hf_folder
from weightcast.sync.disk.fleet_records import MEMBER_PREFIX, Member
from weightcast.sync.disk.naming import ENGINES, version_folder
from weightcast.sync.disk.reading import OpenFiles
from weightcast.sync.disk.records import MAX_RECORD_BYTES, EngineStatus, Hashing, Unfinished, unseal
from weightcast.sync.disk.routes import Route, Step, VersionInfo, route_to
from weightcast.sync.disk.staged import StagedCopy
from weightcast.sync.disk.store import Store, open_store, read_file
from weightcast.sync.errors import ConfigError, DamagedVersion, WireError
from weightcast.sync.version import Version


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A version of the store. `faults` is empty when nothing was found, or nothing was looked for."""

    version: Version
    folder: str
    is_anchor: bool
    base: Version | None
    is_hf_folder: bool
    num_tensors: int
    model_bytes: int
    dense_bytes: int
    delta_bytes: int
    num_files: int
    created_s: float
    is_released: bool | None
    """Whether the fleet released it; None: it needs no release."""
    route: Route | None
    """How an engine that holds nothing gets there; None: it cannot."""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreListing:
    """A whole store. `damaged` versions have a manifest that cannot be believed, `unfinished` ones have none."""

    place: str
    versions: tuple[VersionRow, ...]
    damaged: tuple[str, ...]
    unfinished: tuple[Version, ...]
    engines: tuple[EngineStatus, ...]
    was_checked: bool

    @property
    def faults(self) -> tuple[str, ...]:
        """All that is wrong."""
        return (*self.damaged, *(fault for row in self.versions for fault in row.faults))


def list_versions(place: "str | Path | Store", *, check: bool = False, key: bytes | None = None) -> StoreListing:
    """List a store, oldest version first. `check` reads every file and assembles every version: hashes and digests.

    Checking takes the memory of one model. Raises `ConfigError` for a folder that is not there.
    """
    if isinstance(place, str | Path) and "://" not in str(place) and not Path(place).is_dir():
        raise ConfigError(f"there is no folder {place}; name the one that a DiskPublisher writes to")
    with closing(open_store(place)) as store:
        return _list(store, check, Hashing(key))


def _list(store: Store, check: bool, hashing: Hashing) -> StoreListing:
    catalog = Catalog(store, hashing, host_limits())
    infos = catalog.refresh()
    by_version = {info.version: info for info in infos}
    rows = []
    for info in infos:
        manifest = catalog.manifest(info.version)
        rows.append(
            VersionRow(
                *(info.version, version_folder(info.version), info.is_anchor),
                *(None if info.base is None else info.base.version, is_hf_folder(manifest), len(manifest.specs)),
                *(sum(spec.num_bytes for spec in manifest.specs), info.dense_bytes, info.delta_bytes),
                *(len(manifest.files), info.created_s),
                _is_released(store, info, hashing),
                route_to(info.version, by_version),
            )
        )
    if check:
        rows = _check(catalog, hashing, infos, rows)
    damaged = tuple(str(error) for _, error in sorted(catalog.damaged.items()))
    return StoreListing(store.url, tuple(rows), damaged, catalog.unfinished(), _read_engines(store, hashing), check)


def _is_released(store: Store, info: VersionInfo, hashing: Hashing) -> bool | None:
    try:
        return read_release(store, info, hashing) if info.is_governed else None
    except (OSError, WireError):
        return False


def _check(
    catalog: Catalog, hashing: Hashing, infos: Sequence[VersionInfo], rows: Sequence[VersionRow]
) -> list[VersionRow]:
    """Follow the versions one by one: each delta upon its base, each anchor by itself."""
    copy = StagedCopy(catalog, hashing)
    checked = []
    for info, row in zip(infos, rows, strict=True):
        faults = []
        if info.base is not None:
            held = copy.held
            if held is not None and (held.version, held.seal) == (info.base.version, info.base.seal):
                faults += _try_step(copy, Step(info.version, "delta"), infos)
            elif not info.is_anchor:
                copy.held = None
                faults.append(
                    f"version {info.version} was not checked: its base {info.base.version} is damaged or gone"
                )
        if info.is_anchor:
            faults += _try_step(copy, Step(info.version, "dense"), infos)
            faults += _check_extra_files(catalog, hashing, info.version)
        checked.append(replace(row, faults=tuple(faults)))
    return checked


def _check_extra_files(catalog: Catalog, hashing: Hashing, version: Version) -> list[str]:
    """Configuration, tokenizer and index, which no piece lies in."""
    try:
        manifest = catalog.manifest(version)
        OpenFiles(catalog.store, manifest, hashing, manifest.find_extra_files()).close()
    except DamagedVersion as error:
        return [str(error)]
    return []


def _try_step(copy: StagedCopy, step: Step, infos: Sequence[VersionInfo]) -> list[str]:
    try:
        copy.follow(Route(step.version, (step,)), infos)
    except DamagedVersion as error:
        return [str(error)]
    return []


def _read_engines(store: Store, hashing: Hashing) -> tuple[EngineStatus, ...]:
    engines: dict[str, EngineStatus] = {}
    for name in sorted(store.files(ENGINES)):  # those that agree come last, and know best
        try:
            raw = read_file(store, ENGINES, name, MAX_RECORD_BYTES)
            if name.startswith(MEMBER_PREFIX):
                member = unseal(raw, Member, hashing)
                status = EngineStatus(member.engine, member.serving, member.reason, member.at_s)
            else:
                status = unseal(raw, EngineStatus, hashing)
        except (OSError, Unfinished, WireError):
            continue  # another's file, or one that is being replaced: engines are only shown
        engines[status.engine] = status
    return tuple(engines[name] for name in sorted(engines))


def render(listing: StoreListing) -> RenderableType:
    """A table of versions, and what is wrong."""
    table = Table(title=f"{listing.place}: {len(listing.versions)} versions")
    for column in ("version", "epoch", "kind", "written (UTC)", "HF folder", "files"):
        table.add_column(column)
    for column in ("anchor bytes", "delta bytes", "of model"):
        table.add_column(column, justify="right")
    table.add_column("checked" if listing.was_checked else "reached by")
    for row in listing.versions:
        kind = "anchor" if row.is_anchor else "delta"
        kind += " + delta" if row.is_anchor and row.base is not None else ""
        kind += ", not released" if row.is_released is False else ""
        share = f"{row.delta_bytes / row.model_bytes:.2%}" if row.base is not None and row.model_bytes else ""
        written = datetime.fromtimestamp(row.created_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(
            *(str(row.version.number), str(row.version.epoch), kind, written, "yes" if row.is_hf_folder else "no"),
            *(str(row.num_files), f"{row.dense_bytes:,}", f"{row.delta_bytes:,}", share, _state(row, listing)),
        )
    lines = [f"damaged: {fault}" for fault in listing.faults]
    lines += [f"unfinished, no version: {version_folder(version)}" for version in listing.unfinished]
    for engine in listing.engines:
        serving = "nothing" if engine.serving is None else f"version {engine.serving}"
        lines.append(f"engine {engine.engine} serves {serving}{f': {engine.reason}' if engine.reason else ''}")
    return Group(table, *(Text(line) for line in lines))  # plain: names have brackets


def _state(row: VersionRow, listing: StoreListing) -> str:
    if listing.was_checked:
        return "damaged" if row.faults else "whole"
    if row.route is None:
        return "nothing"
    deltas = len(row.route.steps) - 1
    return f"anchor {row.route.steps[0].version.number}" + (f" + {deltas} deltas" if deltas else "")


def as_json(listing: StoreListing) -> dict[str, Any]:
    """The same for programs."""
    return asdict(listing) | {"faults": list(listing.faults)}
