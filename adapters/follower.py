"""The loop that keeps an engine in step: take a staged version, commit it, report it, wait for the next.

Everything that waits for the network happened before `wait` returned; from there on only local memory is read. An
update that is refused leaves the engine serving its old version and the loop waiting for the next one; an engine
whose loading broke off in the middle is left paused, reported, and never serves again.

    with WeightSubscriber("tcp://127.0.0.1:5600", engine=engine.name) as subscriber:
        EngineFollower(engine, subscriber).run(stop=threading.Event())
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from weightcast.adapters.engine import Engine, PauseMode
from weightcast.adapters.lifecycle import Event, Failed, FollowerState, Loaded, Paused, Prepared, Refused, Resumed
from weightcast.adapters.lifecycle import advance as advance_state
from weightcast.adapters.timeline import EventLog
from weightcast.sync import Span
from weightcast.sync.errors import DeadlineExceeded, EngineError, ModelMismatch, WeightcastError
from weightcast.sync.following import VersionSubscriber, VersionUpdate

logger = logging.getLogger(__name__)

_RETRY_S = 0.2  # after an error that is not one version's (a publisher that is gone), before the next wait


class EngineFollower:
    """Commits the versions of one subscriber (to a publisher or a store) to one engine. One thread calls `run`, `step`.

    `pause_mode` says what happens to requests that run when a version is swapped in, and `pause_timeout_s` how long
    a pause may take before the version is given up for late. `events` is a file for JSON lines of phases.
    """

    def __init__(
        self,
        engine: Engine,
        subscriber: VersionSubscriber,
        *,
        pause_mode: PauseMode = "wait",
        pause_timeout_s: float = 60.0,
        events: Path | None = None,
        process: str = "engine",
    ) -> None:
        self._engine = engine
        self._subscriber = subscriber
        self._pause_mode = pause_mode
        self._pause_timeout_s = pause_timeout_s
        self._log = EventLog(process, events)
        self._state = FollowerState()

    @property
    def state(self) -> FollowerState:
        """A snapshot, for status pages; may be read from any thread."""
        return self._state

    def run(self, stop: threading.Event, *, poll_s: float = 0.5, when_idle: Callable[[], None] | None = None) -> None:
        """Follow until `stop` is set. Raises `EngineError` when the engine is poisoned; goes on after all else.

        `when_idle` is called whenever no version came for `poll_s`.
        """
        while not stop.is_set():
            try:
                self.step(poll_s)
            except DeadlineExceeded:  # nothing new within poll_s
                if when_idle is not None:
                    when_idle()
            except EngineError:
                raise
            except WeightcastError as error:
                if str(error) != self._state.last_error:  # a publisher of another model raises at every wait
                    self._advance(Refused(None, str(error)))
                    logger.warning("%s: no update taken: %s", self._engine.name, error)
                stop.wait(_RETRY_S)

    def step(self, timeout_s: float) -> bool:
        """Wait for the next version and commit it; whether the engine serves it now.

        Raises `DeadlineExceeded` when none came within `timeout_s`, `PeerLost` or `ModelMismatch` as
        `WeightSubscriber.wait` does, and `EngineError` when the engine holds undefined weights.
        """
        if not self._state.healthy:
            raise EngineError(f"{self._engine.name} is poisoned ({self._state.last_error}); restart the engine")
        return self.take(self._subscriber.wait(timeout_s))

    def take(self, update: VersionUpdate) -> bool:
        """Commit one update: prepare, pause, load, resume. False when it was refused."""
        version = update.version
        stats = update.stats
        if stats.staged_at_s > stats.started_at_s:  # not an observer's; the subscriber itself tells the fleet of it
            self._log.record(version, Span("stage", stats.started_at_s, stats.staged_at_s))
        try:
            with self._log.phase("prepare", version):
                self._engine.prepare(version, update.specs)
        except EngineError as error:
            raise self._poison(update, error) from error
        except WeightcastError as error:
            return self._refuse(update, error)
        self._advance(Prepared(version))
        started_s = time.monotonic()
        if not self._swap(update):
            return False
        pause_s = time.monotonic() - started_s
        update.commit(pause_s=pause_s, spans=self._log.take(version))
        self._log.note("serving", version, pause_s=pause_s)
        logger.info("%s serves version %s after a pause of %.1f ms", self._engine.name, version, pause_s * 1e3)
        return True

    def _swap(self, update: VersionUpdate) -> bool:
        """Pause, load and resume; False when the update was refused and the old version serves again."""
        version = update.version
        try:
            with self._log.phase("pause", version):
                self._engine.pause(self._pause_mode, self._pause_timeout_s)
        except WeightcastError as error:
            return self._refuse(update, error)
        self._advance(Paused())
        try:
            with self._log.phase("load", version):
                self._engine.load(version, iter(update))
                update.release()
        except ModelMismatch as error:
            self._engine.resume()
            return self._refuse(update, error)
        except Exception as error:
            raise self._poison(update, error) from error
        self._advance(Loaded())
        try:
            with self._log.phase("resume", version):
                self._engine.resume()
        except Exception as error:
            raise self._poison(update, error) from error
        self._advance(Resumed())
        return True

    def _refuse(self, update: VersionUpdate, error: Exception) -> bool:
        self._advance(Refused(update.version, str(error)))
        logger.error("%s refuses version %s and serves on: %s", self._engine.name, update.version, error)
        self._log.note("refused", update.version, reason=str(error))
        self._log.take(update.version)
        update.reject(str(error))
        return False

    def _poison(self, update: VersionUpdate, error: Exception) -> EngineError:
        reason = f"loading version {update.version} broke off: {error!r}"
        self._advance(Failed(reason))
        logger.error("%s stays paused, its weights are undefined: %s", self._engine.name, reason)
        self._log.note("poisoned", update.version, reason=reason)
        update.reject(reason)
        return EngineError(f"{self._engine.name} is poisoned: {reason}; restart the engine")

    def _advance(self, event: Event) -> None:
        self._state = advance_state(self._state, event)
