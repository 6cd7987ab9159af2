"""The loop of an engine whose versions land in its own tensors: there is no staged copy, and it stands still meanwhile.

    engine = TransformersEngine(Path("path/to/hf"))
    with WeightSubscriber(address, engine=engine.name, into=engine.own_tensors()) as subscriber:
        InPlaceFollower(engine, subscriber).run(stop=threading.Event())

A version is announced, the engine pauses, the version lands, the engine resumes: the pause is as long as the transfer.
Where the transfer breaks off before anything was written the engine serves on as it did. Afterwards its tensors are
torn: it stays paused, and the next version lands whole over them.
"""

import logging
import time
from pathlib import Path
from typing import Protocol

import torch

from weightcast.adapters.engine import Engine, PauseMode
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.lifecycle import Landed, Paused, Prepared, Refused, Resumed, Torn
from weightcast.sync import Version, WeightSubscriber
from weightcast.sync.errors import EngineError, WeightcastError

logger = logging.getLogger(__name__)


class InPlaceEngine(Engine, Protocol):
    """An engine whose memory may be written by others while it is paused."""

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What it serves from, by HF name: see `into` of `WeightSubscriber`."""
        ...

    def landed(self, version: Version) -> None:
        """Its tensors have the bits of `version`: take on its label. Called while paused."""
        ...


class InPlaceFollower(EngineFollower):
    """As `EngineFollower`, of a subscriber that was made with `into=engine.own_tensors()`.

    `land_timeout_s` bounds how long a version may take once the engine is paused for it.
    """

    def __init__(
        self,
        engine: InPlaceEngine,
        subscriber: WeightSubscriber,
        *,
        pause_mode: PauseMode = "wait",
        pause_timeout_s: float = 60.0,
        land_timeout_s: float = 600.0,
        events: Path | None = None,
        process: str = "engine",
    ) -> None:
        options = {"pause_mode": pause_mode, "pause_timeout_s": pause_timeout_s, "events": events, "process": process}
        super().__init__(engine, subscriber, **options)  # type: ignore[arg-type]
        self._own = engine
        self._place = subscriber
        self._land_timeout_s = land_timeout_s

    def step(self, timeout_s: float) -> bool:
        """Wait until a version is announced, pause, and land it; whether the engine serves it now.

        Raises `DeadlineExceeded` when none was within `timeout_s`, and otherwise as `EngineFollower.step`.
        """
        if self._state.phase == "poisoned":
            raise EngineError(f"{self._engine.name} is poisoned ({self._state.last_error}); restart the engine")
        return self._land(self._place.wait_announced(timeout_s))

    def _land(self, version: Version) -> bool:
        self._advance(Prepared(version))
        started_s = time.monotonic()
        try:
            with self._log.phase("pause", version):
                self._engine.pause(self._pause_mode, self._pause_timeout_s)
        except WeightcastError as error:
            self._advance(Refused(version, str(error)))
            logger.warning("%s could not pause for version %s yet: %s", self._engine.name, version, error)
            return False
        self._advance(Paused())
        try:
            with self._log.phase("load", version):
                update = self._place.wait(self._land_timeout_s)
        except WeightcastError as error:
            self._break_off(version, error)
            return False
        self._own.landed(update.version)
        self._advance(Landed(update.version))
        try:
            with self._log.phase("resume", version):
                self._engine.resume()
        except Exception as error:
            raise self._poison(update, error) from error
        self._advance(Resumed())
        pause_s = time.monotonic() - started_s
        update.commit(pause_s=pause_s, spans=self._log.take(version))
        self._log.note("serving", update.version, pause_s=pause_s)
        logger.info("%s serves version %s after a pause of %.1f ms", self._engine.name, update.version, pause_s * 1e3)
        return True

    def _break_off(self, version: Version, error: WeightcastError) -> None:
        """What was to land did not; whether the engine may serve depends on what was written of it."""
        self._log.take(version)
        held = self._place.held
        if held is not None and held.is_torn:
            self._advance(Torn(str(error)))
            self._log.note("torn", version, reason=str(error))
            logger.error("%s stays paused until the next version: %s", self._engine.name, error)
            return
        self._engine.resume()
        self._advance(Refused(version, str(error)))
        self._log.note("refused", version, reason=str(error))
        logger.error("%s took nothing of version %s and serves on: %s", self._engine.name, version, error)
