"""The thread behind a `DiskSubscriber`: looks for versions, stages the newest, waits while one is being loaded."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from weightcast.sync.disk.agreement import Agreement
from weightcast.sync.disk.catalog import Catalog
from weightcast.sync.disk.naming import ENGINES, engine_file
from weightcast.sync.disk.records import EngineStatus, Hashing, seal
from weightcast.sync.disk.routes import Route, Step, VersionInfo, find_route, route_to
from weightcast.sync.disk.staged import BitsDiffer, StagedCopy, StageStats, StepFailed
from weightcast.sync.errors import ModelMismatch, StorageError, VersionError, WeightcastError
from weightcast.sync.records import Span
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
        agree: bool | None = None,
    ) -> None:
        self.lock = threading.Condition()
        self.serving = serving
        self.newest: Version | None = None
        self.specs: tuple[TensorSpec, ...] | None = None
        self.ready: tuple[Version, StageStats] | None = None
        self.taken: Version | None = None
        self._awaiting: tuple[Version, StageStats] | None = None  # staged, and not released
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
        self.agreement = Agreement(catalog, hashing, engine, agree, serving=serving)
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

    def release(
        self, version: Version, *, serving: bool, reason: str, pause_s: float = 0.0, spans: Sequence[Span] = ()
    ) -> None:
        """The version that was taken is served, or refused for a reason."""
        if serving:
            self.agreement.member.note_serving(version, pause_s, spans)
        else:
            self.agreement.member.note_refused(version, reason)
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
        """Look, and stage the next version that can be reached; whether there may be more to do at once."""
        infos = self._catalog.refresh()
        self._note(infos)
        self.agreement.look(infos)
        self._pass_on(infos)
        with self.lock:
            before = self.ready, self._awaiting, self.taken, self._above
        staged = before[0] or before[1]
        above = before[3] if staged is None else staged[0]
        route = self._choose_route(infos, above, is_ready=before[0] is not None)
        with self.lock:
            if before != (self.ready, self._awaiting, self.taken, self._above):
                return self.taken is None  # taken or committed meanwhile: where to go must be asked anew
            if route is None or self.taken is not None:
                self._doing = self._describe_store(infos, above)
                return False
            self.ready = self._awaiting = None  # the copy is worked on
            self._doing = f"version {route.target} is being staged in {len(route.steps)} steps"
        try:
            stats = self._copy.follow(route, infos)
        except Exception as error:
            with self.lock:
                # A delta whose files are damaged leaves the copy, and what was ready, as it was.
                if staged is not None and self._copy.version == staged[0]:
                    self.ready, self._awaiting = before[0], before[1]
            if self._can_go_on(error, route):
                return True
            self._refuse_lost(route.target, infos, error)
            raise
        self._end_staging(route.target, stats, infos)
        return True

    def _choose_route(self, infos: Sequence[VersionInfo], above: Version | None, *, is_ready: bool) -> Route | None:
        """To what the fleet serves first, then to what it has not released yet."""
        candidates = self.agreement.choose(infos, above, self._copy.version)
        route = find_route(candidates, self._copy.held, above, self._spoiled)
        if route is None and len(candidates) < len(infos):  # what is released cannot be reached
            route = find_route(infos, self._copy.held, above, self._spoiled)
        if route is not None and is_ready and not self._is_free(route.target, infos):
            return None  # what may be served is not given up for what may not
        return route

    def _end_staging(self, version: Version, stats: StageStats, infos: Sequence[VersionInfo]) -> None:
        self.agreement.member.note_staged(version, stats.stage_s, stats.num_bytes, stats.checksums_checked)
        with self.lock:
            self._awaiting = (version, stats)
            # The store is in reach again. Damage is told all the same, once, though there was a way around it.
            self._errors = deque(error for error in self._errors if not isinstance(error, StorageError))
        self._pass_on(infos)

    def _is_free(self, version: Version, infos: Sequence[VersionInfo]) -> bool:
        return any(info.version == version and self.agreement.is_free(info) for info in infos)

    def _pass_on(self, infos: Sequence[VersionInfo]) -> None:
        """Give out what is staged, once it may be served."""
        awaiting = self._awaiting
        if awaiting is None:
            return
        is_free = self._is_free(awaiting[0], infos)
        with self.lock:
            self._doing = self.agreement.describe(awaiting[0], infos)
            if is_free:
                self.ready, self._awaiting = awaiting, None
                self.lock.notify_all()

    def _refuse_lost(self, target: Version, infos: Sequence[VersionInfo], error: Exception) -> None:
        """Tell the fleet of a version to which no way is left."""
        by_version = {info.version: info for info in infos}
        if not isinstance(error, StorageError) and route_to(target, by_version, self._copy.held, self._spoiled) is None:
            self.agreement.member.note_refused(target, str(error))

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
                self.agreement.member.note_refused(version, str(error))
                raise error

    def _describe_store(self, infos: Sequence[VersionInfo], above: Version | None) -> str:
        if self._awaiting is not None:
            return self.agreement.describe(self._awaiting[0], infos)
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
        self.agreement.close()
        try:
            self._write_status()
        except StorageError as error:
            logger.warning("%s: %s", self._engine, error)
