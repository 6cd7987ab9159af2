"""Torch's profiler over some steps of a run, as a callback.

    weightcast train recipe=llama32_1b.pretrain proxy=true profiling.use_pytorch_profiler=true \\
        profiling.profile_step_start=5 profiling.profile_step_end=6

Profiled are whole steps with what follows them: callbacks, publishing, evaluation. A run that ends or fails in between
leaves the trace of what there was.
"""

import logging
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config.profiling import ProfilingConfig
from weightcast.trainer.figures import StepReport
from weightcast.trainer.state import TrainState
from weightcast.trainer.stopping import Stop

logger = logging.getLogger(__name__)


class StepProfiler(Callback):
    """Profiles this rank; a context manager, so that an error still leaves a trace."""

    def __init__(self, settings: ProfilingConfig, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._running: profile | None = None
        self._first_step = self._last_step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def on_train_start(self, state: TrainState) -> None:
        self._start_before(state.step + 1)

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        self._last_step = report.step
        if report.step >= self._settings.profile_step_end:
            self._write()
        self._start_before(report.step + 1)

    def on_train_end(self, state: TrainState, stop: Stop) -> None:
        self._write()

    def _start_before(self, step: int) -> None:
        settings = self._settings
        if self._running is not None or not settings.profile_step_start <= step <= settings.profile_step_end:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._running = profile(
            activities=activities, record_shapes=settings.record_shapes, profile_memory=settings.profile_memory
        )
        self._running.start()
        self._first_step = self._last_step = step

    def _write(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        folder = Path(self._settings.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{self._rank}-steps{self._first_step}-{self._last_step}.json.gz"
        running.export_chrome_trace(str(path))
        logger.info("profiled steps %d to %d: %s", self._first_step, self._last_step, path)
