"""A bar with step, loss, gradient norm, tokens/s and the time left, on the terminal of rank 0.

The bar counts samples, not steps, so that the time left is right while the batch size ramps up.

with ProgressBar(cfg) as bar: ...                   # a callback
"""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from weightcast.trainer.batch_schedule import batch_schedule
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.figures import EvalReport, StepReport
from weightcast.trainer.state import TrainState

_SPEED_OVER_S = 3600.0  # rich's 30 s would know no speed where a step takes longer


class ProgressBar(Callback):
    """Draws the bar; a context manager that takes it away."""

    def __init__(self, config: ConfigContainer, console: Console) -> None:
        self._batches = batch_schedule(config)
        self._last_step = self._batches.last_step()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_SPEED_OVER_S,
        )
        self._task = self._progress.add_task("training", total=None, steps="", figures="")
        self._validation = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_train_start(self, state: TrainState) -> None:
        step, consumed = state.step, state.consumed_samples
        self._last_step = self._batches.last_step(step, consumed)
        total = consumed + self._batches.samples_of(self._last_step - step, consumed)
        self._progress.update(self._task, total=total, completed=consumed, steps=self._steps(step))

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        figures = f"loss {report.loss:.4f}  grad norm {report.grad_norm:.3f}  {report.tokens_per_s:,.0f} tokens/s"
        self._progress.update(
            self._task,
            completed=report.consumed_samples,
            steps=self._steps(report.step),
            figures=figures + self._validation,
        )

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        self._validation = f"  validation {report.loss:.4f}"

    def _steps(self, step: int) -> str:
        return f"{step}/{self._last_step}"


def is_wanted(config: ConfigContainer, console: Console) -> bool:
    """Whether the bar is drawn: `logger.progress` says so, and the console is a terminal."""
    return config.logger.progress and console.is_terminal
