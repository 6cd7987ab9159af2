"""What versions a store has: manifests read once, checked, and remembered in a few words each.

    catalog = Catalog(store, Hashing(), limits)
    for info in catalog.refresh(): ...
    manifest = catalog.manifest(info.version)

A folder without a manifest, or with one that is cut short, is no version (yet). One whose manifest is damaged is listed
in `damaged`, and never looked at again.
"""

import os

from weightcast.sync.checkpoint_files import INDEX_FILE
from weightcast.sync.disk.fleet_records import FLEET
from weightcast.sync.disk.manifest_checks import ModelLimits, check_manifest
from weightcast.sync.disk.naming import MANIFEST, parse_run_folder, parse_version_folder, version_folder
from weightcast.sync.disk.records import MAX_RECORD_BYTES, MAX_TENSORS, Hashing, Unfinished, VersionManifest, unseal
from weightcast.sync.disk.routes import VersionInfo
from weightcast.sync.disk.store import Store, raise_passing, read_file
from weightcast.sync.errors import DamagedVersion, WireError
from weightcast.sync.version import Version


def host_limits() -> ModelLimits:
    """What this host can hold at all: a staged copy lies in memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ModelLimits(memory_bytes, MAX_TENSORS)


def damage(store: Store, version: Version, file: str, why: str) -> DamagedVersion:
    """The error for a version that cannot be used because of one file."""
    return DamagedVersion(
        f"{store.url}/{version_folder(version)}/{file} of version {version}: {why}. It is not used again here; what is "
        "served stays as it is, and the next anchor heals it: publish one, or copy the file again and start anew"
    )


class Catalog:
    """See the module."""

    def __init__(self, store: Store, hashing: Hashing, limits: ModelLimits) -> None:
        self.store = store
        self.damaged: dict[Version, DamagedVersion] = {}
        self.newest_run = -1
        """The epoch of the newest publisher's life that `refresh` saw; -1: none."""
        self._hashing = hashing
        self._limits = limits
        self._infos: dict[Version, VersionInfo] = {}
        self._last: VersionManifest | None = None

    def refresh(self) -> tuple[VersionInfo, ...]:
        """All whole versions, rising. New ones are read; those that were removed are forgotten."""
        names = self.store.folders()
        self.newest_run = max((run for name in names if (run := parse_run_folder(name)) is not None), default=-1)
        found = {version for name in names if (version := parse_version_folder(name)) is not None}
        for version in self._infos.keys() - found:
            del self._infos[version]
        for version in self.damaged.keys() - found:
            del self.damaged[version]
        for version in sorted(found - self._infos.keys() - self.damaged.keys()):
            if (info := self._read_info(version)) is not None:
                self._infos[version] = info
        return tuple(self._infos[version] for version in sorted(self._infos))

    def unfinished(self) -> tuple[Version, ...]:
        """Versions whose folders have no whole manifest, as of now."""
        found = {version for name in self.store.folders() if (version := parse_version_folder(name)) is not None}
        return tuple(sorted(found - self._infos.keys() - self.damaged.keys()))

    def manifest(self, version: Version) -> VersionManifest:
        """The manifest of a version that `refresh` listed. Raises `DamagedVersion` when it is not the same any more."""
        info = self._infos[version]
        if self._last is not None and self._last.version == version:
            return self._last
        read = self._read(version)
        if read is None or read[1] != info.seal:
            raise damage(self.store, version, MANIFEST, "it was removed or replaced since it was listed")
        self._last = read[0]
        return read[0]

    def is_removed(self, version: Version) -> bool:
        """Whether a version that was listed has no manifest any more; it is forgotten then."""
        if MANIFEST in self.store.files(version_folder(version)):
            return False
        self._forget(version)
        return True

    def _forget(self, version: Version) -> None:
        self._infos.pop(version, None)
        if self._last is not None and self._last.version == version:
            self._last = None

    def _read_info(self, version: Version) -> VersionInfo | None:
        try:
            read = self._read(version)
        except DamagedVersion as error:
            self.damaged[version] = error
            return None
        if read is None:
            return None
        manifest, seal = read
        self._last = manifest
        return describe(manifest, seal)

    def _read(self, version: Version) -> tuple[VersionManifest, bytes] | None:
        try:
            raw = read_file(self.store, version_folder(version), MANIFEST, MAX_RECORD_BYTES + 1024)
            manifest = unseal(raw, VersionManifest, self._hashing)
            check_manifest(manifest, version, self._hashing, self._limits)
        except (FileNotFoundError, NotADirectoryError, Unfinished):
            return None
        except OSError as error:
            raise_passing(f"{self.store.url}/{version_folder(version)}/{MANIFEST}", error)
            raise damage(self.store, version, MANIFEST, str(error)) from error
        except WireError as error:
            raise damage(self.store, version, MANIFEST, str(error)) from error
        return manifest, self._hashing.of(raw)


def describe(manifest: VersionManifest, seal: bytes) -> VersionInfo:
    """A manifest in a few words. Pure."""
    dense = {piece.file for piece in manifest.dense}
    delta = {piece.file for piece in manifest.delta}
    sizes = [file.num_bytes for file in manifest.files]
    return VersionInfo(
        *(manifest.version, seal, manifest.is_anchor, manifest.base),
        *(sum(sizes[file] for file in dense), sum(sizes[file] for file in delta), manifest.created_s),
        is_governed=any(file.name == FLEET for file in manifest.files),
    )


def is_hf_folder(manifest: VersionManifest) -> bool:
    """Whether a version's folder is an ordinary Hugging Face folder of safetensors as it stands."""
    return manifest.is_anchor and any(file.name == INDEX_FILE for file in manifest.files)
