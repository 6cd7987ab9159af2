"""When a run ends: the last step, a signal, a time limit, or a step at which it was told to leave.

Ranks do not get a signal at the same moment, nor do their clocks agree, so after each step all ranks ask each other and
leave together.

    with Stopping(cfg.train) as stopping:
        while (stop := stopping.reason(state.step, state.consumed_samples)) is None: ...
"""

import logging
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from weightcast.bridges.runtime import current_device
from weightcast.trainer.batch_schedule import schedule_of
from weightcast.trainer.config import TrainConfig

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run ended."""

    reason: str
    is_complete: bool = False
    """All steps were taken."""
    signal_number: int = 0
    """The signal that ended it; 0 for none."""

    @property
    def status(self) -> int:
        """The exit status: 0, or 128 + the signal's number as a shell reports it (143 for SIGTERM)."""
        return 128 + self.signal_number if self.signal_number else 0


class Stopping:
    """Catches signals while it is entered (in the main thread alone) and says when all ranks leave."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._batches = schedule_of(train)
        self._start_s = time.monotonic()
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._train.exit_signal_handler and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def reason(self, step: int, consumed_samples: int) -> Stop | None:
        """Why the run ends after `step`, or `None`. Every rank calls it after each step; a collective."""
        if step >= self._batches.last_step(step, consumed_samples):
            return Stop(f"all {step} steps are done", is_complete=True)
        number, is_over = self._agreed()
        if number:
            return Stop(f"signal {signal.Signals(number).name} after step {step}", signal_number=number)
        if is_over:
            return Stop(f"train.exit_duration_in_mins={self._train.exit_duration_in_mins:g} have passed at step {step}")
        interval = self._train.exit_interval
        if interval is not None and step and step % interval == 0:
            return Stop(f"train.exit_interval={interval} says to leave after step {step}")
        return None

    def _agreed(self) -> tuple[int, bool]:
        """The signal that any rank has got, and whether any rank's time is over."""
        minutes = self._train.exit_duration_in_mins
        if not self._train.exit_signal_handler and minutes is None:
            return 0, False
        is_over = minutes is not None and time.monotonic() - self._start_s > minutes * 60
        seen = torch.tensor([self._received, int(is_over)], device=current_device())
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return int(seen[0].item()), bool(seen[1].item())
