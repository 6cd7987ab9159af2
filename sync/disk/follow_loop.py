"""The thread behind a `DiskSubscriber`: looks for versions, stages the newest, waits while one is being loaded."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from weightcast.sync.disk.catalog import Catalog
from weightcast.sync.disk.naming import ENGINES, engine_file
from weightcast.sync.disk.records import EngineStatus, Hashing, seal
from weightcast.sync.disk.routes import Route, Step, VersionInfo, find_route
from weightcast.sync.disk.staged import BitsDiffer, StagedCopy, StageStats, StepFailed
from weightcast.sync.errors import ModelMismatch, StorageError, VersionError, WeightcastError
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)


class _Closing(Exception):
    """Raised in the middle of staging when the subscriber is closed."""


class FollowLoop:
    """See the module. What is public may be read with `lock` held; the copy is the thread's while nothing is taken."""

    def __init__(
        self,
        catalog: Catalog,
        hashing: Hashing,
        engine: str,
        expect: Sequence[TensorSpec] | None,
        serving: Version | None,
        poll_s: float,
        report: bool,
    ) -> None:
        self.lock = threading.Condition()
        self.serving = serving
        self.newest: Version | None = None
        self.specs: tuple[TensorSpec, ...] | None = None
        self.ready: tuple[Version, StageStats] | None = None
        self.taken: Version | None = None
        self._above = serving
        self._errors: deque[Exception] = deque()
        self._doing = "the store has not been looked at yet"
        self._closed = False
        self._spoiled: set[Step] = set()
        self._told: set[Version] = set()
        self._catalog, self._hashing, self._engine, self._poll_s = catalog, hashing, engine, poll_s
        self._copy = StagedCopy(catalog, hashing, expect, self._keep_going)
        self._status: EngineStatus | None = self._make_status("") if report else None
        self._report = report
        self._thread = threading.Thread(target=self._run, name=f"weightcast-disk-{engine}", daemon=True)
        self._thread.start()

    @property
    def spoiled(self) -> tuple[Version, ...]:
        """Versions of which a step is not used again."""
        with self.lock:
            return tuple(sorted({step.version for step in self._spoiled} | self._told))

    def describe(self) -> str:
        """In one sentence, where it is."""
        return self._doing

    def raise_error(self) -> None:
        """Raise what went wrong, each error once, the oldest first. With `lock` held."""
        if self._errors:
            raise self._errors.popleft()
        if self._closed:
            raise VersionError("this subscriber was closed; make a new one")

    def take(self) -> tuple[dict[str, torch.Tensor], tuple[TensorSpec, ...]]:
        """The staged tensors; the thread leaves the copy alone until `release`. With `lock` held."""
        assert self.ready is not None
        self.taken, self.ready = self.ready[0], None
        return self._copy.tensors(), self._copy.specs

    def release(self, version: Version, *, serving: bool, reason: str) -> None:
        """The version that was taken is served, or refused for a reason."""
        with self.lock:
            self.taken, self._above = None, version
            if serving:
                self.serving = version
            if self._report:
                self._status = self._make_status(reason)
            self.lock.notify_all()

    def _make_status(self, reason: str) -> EngineStatus:
        return EngineStatus(self._engine[:1000], self.serving, reason[:1000], time.time())

    def _keep_going(self) -> None:
        if self._closed:
            raise _Closing

    def _run(self) -> None:
        while not self._closed:
            try:
                self._write_status()
                found_more = self.taken is None and self._advance()
            except _Closing:
                return
            except Exception as error:  # told to whoever waits; the thread must outlive a bad version or a bad disk
                self._fail(error)
                found_more = not isinstance(error, StorageError)
            with self.lock:
                if self._closed:
                    return
                if not found_more or self.taken is not None:
                    self.lock.wait(self._poll_s)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, WeightcastError):
            logger.debug("while following %s", self._catalog.store.url, exc_info=error)
            error = StorageError(
                f"{self._catalog.store.url} could not be read: {error!r}; the engine goes on with what it has, and the "
                "store is looked at again: mend the path, the rights or the network"
            )
        logger.warning("%s: %s", self._engine, error)
        with self.lock:
            if str(error) not in map(str, self._errors):  # a store that is out of reach fails every time
                self._errors.append(error)
            self.lock.notify_all()

    def _advance(self) -> bool:
        """Look, and stage the newest version that can be reached; whether there may be more to do at once."""
        infos = self._catalog.refresh()
        self._note(infos)
        with self.lock:
            above = self._above if self.ready is None else self.ready[0]
            route = find_route(infos, self._copy.held, above, self._spoiled)
            if route is None or self.taken is not None:
                self._doing = self._describe_store(infos, above)
                return False
            before, self.ready = self.ready, None  # the copy is worked on
            self._doing = f"version {route.target} is being staged in {len(route.steps)} steps"
        try:
            stats = self._copy.follow(route, infos)
        except Exception as error:
            with self.lock:
                # A delta whose files are damaged leaves the copy, and what was ready, as it was.
                if before is not None and self._copy.version == before[0]:
                    self.ready = before
            if self._can_go_on(error, route):
                return True
            raise
        with self.lock:
            self.ready = (route.target, stats)
            # The store is in reach again. Damage is told all the same, once, though there was a way around it.
            self._errors = deque(error for error in self._errors if not isinstance(error, StorageError))
            self.lock.notify_all()
        return True

    def _can_go_on(self, error: Exception, route: Route) -> bool:
        """Mark what is not to be used again; whether there is another way, so that nobody need be told."""
        if isinstance(error, StepFailed) and self._catalog.is_removed(error.step.version):
            return True  # by the publisher, which keeps only the newest
        if isinstance(error, BitsDiffer) and route.is_upon_held:
            # What the copy held may have been at fault: nothing is blamed before an anchor was tried.
            logger.warning("%s: %s; assembled anew from an anchor", self._engine, error)
            return True
        with self.lock:
            if isinstance(error, ModelMismatch):
                self._spoiled |= {Step(route.target, "dense"), Step(route.target, "delta")}
            elif isinstance(error, StepFailed):
                self._spoiled.add(error.step)
        return False

    def _note(self, infos: Sequence[VersionInfo]) -> None:
        """Remember what was seen, and tell of each damaged manifest that might have been of use, once."""
        newest = infos[-1].version if infos else None
        if newest is not None and newest != self.newest:
            specs = self._catalog.manifest(newest).specs
            with self.lock:
                self.newest, self.specs = newest, specs
                self.lock.notify_all()
        there = {info.version for info in infos} | self._catalog.damaged.keys()
        self._spoiled = {step for step in self._spoiled if step.version in there}
        self._told &= there
        for version, error in self._catalog.damaged.items():
            if version not in self._told and (self._above is None or version > self._above):
                self._told.add(version)
                raise error

    def _describe_store(self, infos: Sequence[VersionInfo], above: Version | None) -> str:
        if not infos:
            return "it has no whole version yet: start the publisher, and give both the same place"
        newer = "" if above is None else f" newer than {above}"
        kept_from = f", those of {', '.join(map(str, sorted(self._told)))} are damaged" if self._told else ""
        return (
            f"no whole version{newer} can be reached; it has {len(infos)}, the newest is {infos[-1].version}{kept_from}"
        )

    def _write_status(self) -> None:
        with self.lock:
            status, self._status = self._status, None
        if status is not None:
            self._catalog.store.write(ENGINES, engine_file(self._engine), [seal(status, self._hashing)])

    def close(self) -> None:
        """End the thread; a status that was not written yet is written first."""
        with self.lock:
            self._closed = True
            self.lock.notify_all()
        self._thread.join()
        try:
            self._write_status()
        except StorageError as error:
            logger.warning("%s: %s", self._engine, error)
