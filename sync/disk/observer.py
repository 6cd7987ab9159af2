"""Watches a store for a process that drives an engine whose workers read the versions by themselves.

    with DiskObserver("/shared/versions", engine="vllm/driver") as observer:
        update = observer.wait(timeout_s=60)     # a version that may be served; it has no tensors
        update.commit(pause_s=...)

In a fleet it is told of released versions alone, and `publish` waits until it has committed them.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from weightcast.sync.disk.agreement import Agreement
from weightcast.sync.disk.catalog import Catalog
from weightcast.sync.disk.manifest_checks import ModelLimits
from weightcast.sync.disk.records import MAX_TENSORS, Hashing
from weightcast.sync.disk.routes import VersionInfo
from weightcast.sync.disk.staged import StageStats
from weightcast.sync.disk.store import Store, open_store
from weightcast.sync.errors import DeadlineExceeded, StorageError
from weightcast.sync.records import Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.schema import MAX_UINT
from weightcast.sync.version import Version


@dataclass(frozen=True, slots=True)
class ObservedUpdate:
    """A version without its tensors. `commit` or `reject` it once."""

    version: Version
    specs: tuple[TensorSpec, ...]
    stats: StageStats
    _observer: "DiskObserver"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())

    def release(self) -> None:
        """Nothing was read."""

    def commit(self, pause_s: float = 0.0, spans: Sequence[Span] = ()) -> None:
        """Say that the engine serves this version; `pause_s` is how long it answered nobody for it."""
        self._observer.end(self.version, "", pause_s, spans)

    def reject(self, reason: str) -> None:
        """Say that the engine cannot take this version; it is not offered again."""
        self._observer.end(self.version, reason, 0.0, ())


class DiskObserver:
    """See the module. `agree` and `key` as `DiskSubscriber` has them. For one thread."""

    def __init__(
        self,
        place: "str | Path | Store",
        *,
        engine: str | None = None,
        key: bytes | None = None,
        agree: bool | None = None,
    ) -> None:
        self.engine = engine if engine is not None else f"{socket.gethostname()}-{os.getpid()}"
        self._store = open_store(place)
        # It holds no tensors: how large the model is does not matter here.
        self._catalog = Catalog(self._store, Hashing(key), ModelLimits(MAX_UINT, MAX_TENSORS))
        self._agreement = Agreement(self._catalog, Hashing(key), self.engine, agree, role="observer")
        self._above: Version | None = None
        self.serving: Version | None = None

    @property
    def place(self) -> str:
        """The folder or URL."""
        return self._store.url

    def wait(self, timeout_s: float) -> ObservedUpdate:
        """The newest version that may be served. Raises `DeadlineExceeded`, `StorageError` for a store out of reach."""
        deadline_s = time.monotonic() + timeout_s
        while (info := self._look()) is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                newer = "" if self._above is None else f" newer than {self._above}"
                raise DeadlineExceeded(
                    f"{self.engine!r} waited {timeout_s:g} s for {self.place}: no version{newer} may be served yet"
                )
            time.sleep(min(left_s, self._store.poll_s))
        now_s = time.time()
        stats = StageStats(0, 0.0, 0, now_s, now_s, ())
        return ObservedUpdate(info.version, self._catalog.manifest(info.version).specs, stats, self)

    def _look(self) -> VersionInfo | None:
        try:
            infos = self._catalog.refresh()
            self._agreement.look(infos)
            for info in reversed(infos):
                if self._above is not None and info.version <= self._above:
                    return None
                if self._agreement.is_free(info):
                    return info
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{self.place} could not be read: {error!r}; it is looked at again") from error
        return None

    def resume_from(self, serving: Version | None) -> None:
        """Offer what is newer than `serving`: for an engine that was met anew, and may have begun anew."""
        self._above = self.serving = serving

    def end(self, version: Version, reason: str, pause_s: float, spans: Sequence[Span]) -> None:
        """A version was committed, or refused for a `reason`."""
        self._above = version
        if reason:
            self._agreement.member.note_refused(version, reason)
        else:
            self.serving = version
            self._agreement.member.note_serving(version, pause_s, spans)

    def close(self) -> None:
        """Leave the fleet, and let go of the store."""
        self._agreement.close()
        self._store.close()

    def __enter__(self) -> "DiskObserver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
