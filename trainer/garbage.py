"""Python's garbage collected at fixed steps, so that all ranks pause together (`train.manual_gc`).

with GarbageCollection(cfg.train) as garbage:
    garbage.after_step(7)
"""

import gc
from types import TracebackType
from typing import Self

from weightcast.trainer.config import TrainConfig


class GarbageCollection:
    """Takes over from the interpreter while it is entered, where `manual_gc` says so."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train

    def __enter__(self) -> Self:
        if self._train.manual_gc:
            gc.disable()
            gc.collect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._train.manual_gc:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect where it is time."""
        interval = self._train.manual_gc_interval
        if self._train.manual_gc and interval and step % interval == 0:
            gc.collect()

    def around_evaluation(self) -> None:
        """Collect before and after an evaluation, where `manual_gc_eval` says so."""
        if self._train.manual_gc and self._train.manual_gc_eval:
            gc.collect()
