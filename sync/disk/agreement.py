"""Which versions of a store an engine may be given: those that need no release, and those that have it.

    agreement = Agreement(catalog, hashing, engine="engine-0", agree=None)
    agreement.look(infos)                      # at every poll: joins the fleet where a publisher has a policy
    infos = agreement.choose(infos, above)     # where the engine should go next
    agreement.is_free(info)                    # whether it may serve it

An engine whose version is not the newest released one is fenced, and takes that one first; only then does it stage
what is not released yet.
"""

import logging
from collections.abc import Sequence

from weightcast.sync.disk.catalog import Catalog, damage
from weightcast.sync.disk.fleet_records import FLEET, MAX_SMALL_BYTES, RELEASE, FleetTerms, Release
from weightcast.sync.disk.membership import Membership
from weightcast.sync.disk.naming import RUN, run_folder, version_folder
from weightcast.sync.disk.records import Hashing, Unfinished, unseal
from weightcast.sync.disk.routes import VersionInfo
from weightcast.sync.disk.store import Store, read_file
from weightcast.sync.errors import WireError
from weightcast.sync.fleet import Role
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)


class Agreement:
    """See the module.

    `agree`: True takes nothing but released versions; None does so where the publisher has a policy; False takes every
    whole version, and tells nobody. For one thread; `released` may be read by others.
    """

    def __init__(
        self,
        catalog: Catalog,
        hashing: Hashing,
        engine: str,
        agree: bool | None,
        *,
        role: Role = "receiver",
        serving: Version | None = None,
    ) -> None:
        self._catalog, self._hashing, self._engine, self._agree = catalog, hashing, engine, agree
        self.member = Membership(catalog.store, hashing, engine, role, serving)
        self.released: Version | None = None
        """The newest version that the fleet was seen to have released."""
        self._seen_run = -1
        self._seals: set[bytes] = set()
        self._told: set[Version] = set()
        if agree:
            self.member.join()

    def look(self, infos: Sequence[VersionInfo]) -> None:
        """Join the fleet of the store's newest run, or of its newest version."""
        if self._agree is False:
            return
        newest_run = self._catalog.newest_run
        if newest_run > self._seen_run and self._read_run(newest_run):
            self._seen_run = newest_run
        if infos and infos[-1].is_governed and not self.member.has_joined:
            self.member.join()
        self._note_released(infos)

    def _read_run(self, epoch: int) -> bool:
        """Take on the terms of a run, where it has any; False while it is being made."""
        folder = run_folder(epoch)
        there = self._catalog.store.files(folder)
        try:
            if FLEET in there and (terms := read_terms(self._catalog.store, folder, self._hashing)) is not None:
                self.member.join(terms.lost_after_s)
                return True
        except WireError as error:
            logger.warning("%s: %s/%s/%s is damaged: %s", self._engine, self._catalog.store.url, folder, FLEET, error)
            return True
        return RUN in there  # written after the terms

    def _note_released(self, infos: Sequence[VersionInfo]) -> None:
        for info in reversed(infos):
            if self.released is not None and info.version <= self.released:
                return
            if info.is_governed and self._has_release(info):
                self.released = info.version
                return

    def is_free(self, info: VersionInfo) -> bool:
        """Whether an engine may serve this version now."""
        if self._agree is False:
            return True
        return self._has_release(info) if info.is_governed else self._agree is None

    def _has_release(self, info: VersionInfo) -> bool:
        if info.seal in self._seals:
            return True
        folder = version_folder(info.version)
        if info.version in self._told or RELEASE not in self._catalog.store.files(folder):
            return False
        try:
            release = read_release(self._catalog.store, info, self._hashing)
        except WireError as error:
            self._told.add(info.version)
            logger.warning("%s: %s", self._engine, damage(self._catalog.store, info.version, RELEASE, str(error)))
            return False
        if release:
            self._seals.add(info.seal)
        return release

    def choose(
        self, infos: Sequence[VersionInfo], above: Version | None, held: Version | None
    ) -> Sequence[VersionInfo]:
        """The versions up to the newest free one above `above`; all, where there is none or the copy is beyond it."""
        for info in reversed(infos):
            if above is not None and info.version <= above:
                break
            if self.is_free(info):
                if held is not None and held > info.version:
                    break
                return [other for other in infos if other.version <= info.version]
        return infos

    def describe(self, version: Version, infos: Sequence[VersionInfo]) -> str:
        """Why a version that is staged is not given out."""
        if any(info.version == version and info.is_governed for info in infos):
            return f"version {version} is staged, and the fleet has not released it yet"
        return (
            f"version {version} is staged and not released: its publisher needs a policy "
            "(DiskPublisher(..., policy=FleetPolicy.all())), or this engine should not be asked to agree"
        )

    def close(self) -> None:
        """Leave the fleet."""
        self.member.close()


def read_terms(store: Store, folder: str, hashing: Hashing) -> FleetTerms | None:
    """The terms in a folder; None while they are not whole. Raises `OSError`, `WireError`."""
    try:
        return unseal(read_file(store, folder, FLEET, MAX_SMALL_BYTES), FleetTerms, hashing)
    except (FileNotFoundError, NotADirectoryError, Unfinished):
        return None


def read_release(store: Store, info: VersionInfo, hashing: Hashing) -> bool:
    """Whether a version is released. Raises `WireError` for a record that is damaged or of another version."""
    try:
        raw = read_file(store, version_folder(info.version), RELEASE, MAX_SMALL_BYTES)
        release = unseal(raw, Release, hashing)
    except (FileNotFoundError, NotADirectoryError, Unfinished):
        return False
    if (release.version, release.seal) != (info.version, info.seal):
        raise WireError(f"it releases version {release.version} of another manifest")
    return True
