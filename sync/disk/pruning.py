"""What a publisher removes from a store: unfinished versions of the dead, and old ones that nothing needs any more.

A version's manifest goes first, and for good, so that a removal that is cut short leaves no version that looks whole.
"""

import logging
from collections.abc import Sequence

from weightcast.sync.disk.catalog import Catalog
from weightcast.sync.disk.fleet_records import RELEASE
from weightcast.sync.disk.naming import BEGIN, MANIFEST, RUN, parse_run_folder, run_folder, version_folder
from weightcast.sync.disk.routes import VersionInfo, find_needed
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)


def sweep(catalog: Catalog, epoch: int) -> None:
    """Remove what unfinished versions up to `epoch`, and earlier runs, left behind. For rank 0, between versions."""
    catalog.refresh()
    for version in catalog.unfinished():
        if version.epoch <= epoch:
            _remove(catalog, version_folder(version), MANIFEST)
    for name in catalog.store.folders():
        if (run := parse_run_folder(name)) is not None and run < epoch:
            _remove(catalog, run_folder(run), RUN)


def prune(catalog: Catalog, written: Version, keep: int, *, is_governed: bool = False) -> tuple[Version, ...]:
    """Remove the versions that neither are among the `keep` newest nor needed by those, and say which.

    With `is_governed` the newest one that engines may serve stays as well, since `written` may never be released.

    Of the version just `written`, the records by which its sources met go. What cannot be removed is logged: the
    version is whole all the same.
    """
    folder = version_folder(written)
    try:
        met = [name for name in catalog.store.files(folder) if name == BEGIN or name.startswith("part-")]
        catalog.store.remove(folder, met)
        infos = catalog.refresh()
        also = [version for version in (_find_servable(catalog, infos),) if version is not None] if is_governed else []
    except OSError as error:
        logger.warning("%s could not be tidied up: %s", catalog.store.url, error)
        return ()
    needed = find_needed(infos, keep, also)
    old = [info.version for info in infos if info.version not in needed and info.version < written]
    return tuple(version for version in old if _remove(catalog, version_folder(version), MANIFEST))


def _find_servable(catalog: Catalog, infos: Sequence[VersionInfo]) -> Version | None:
    for info in reversed(infos):
        if not info.is_governed or RELEASE in catalog.store.files(version_folder(info.version)):
            return info.version
    return None


def _remove(catalog: Catalog, folder: str, first: str) -> bool:
    try:
        catalog.store.remove_folder(folder, first)
    except OSError as error:
        logger.warning("%s/%s could not be removed: %s", catalog.store.url, folder, error)
        return False
    return True
