"""How long each phase of a step takes on this rank; each is an event of the log too.

clock = StepClock(events, version=7)
with clock.phase("optimizer"): ...
clock.phases_s
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weightcast.trainer.data.samples import Batch
from weightcast.trainer.events import EventLog
from weightcast.trainer.gpt_step import ForwardStep, LossFunction


class StepClock:
    """Seconds by phase of one step."""

    def __init__(self, events: EventLog, *, version: int) -> None:
        self._events = events
        self._version = version
        self._start_s = time.monotonic()
        self._phases_s: defaultdict[str, float] = defaultdict(float)

    @property
    def step_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._start_s

    @property
    def phases_s(self) -> dict[str, float]:
        """Seconds by phase so far."""
        return dict(self._phases_s)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as a part of phase `name`, and record it."""
        start_s = time.monotonic()
        try:
            with self._events.phase(name, version=self._version):
                yield
        finally:
            self._phases_s[name] += time.monotonic() - start_s

    def timed(self, forward_step: ForwardStep) -> ForwardStep:
        """`forward_step`, with the time in it as phase `forward`: this rank's own model, without waiting for stages."""

        def forward_step_on_the_clock(data: Iterator[Batch], model: Any, **options: Any) -> tuple[Any, LossFunction]:
            start_s = time.monotonic()
            try:
                return forward_step(data, model, **options)
            finally:
                self._phases_s["forward"] += time.monotonic() - start_s

        return forward_step_on_the_clock
