"""A bar with step, loss, gradient norm, tokens/s and the time left, on the terminal of rank 0.

with ProgressBar(cfg) as bar: ...                   # a callback
"""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.figures import EvalReport, StepReport
from weightcast.trainer.state import TrainState


class ProgressBar(Callback):
    """Draws the bar; a context manager that takes it away."""

    def __init__(self, config: ConfigContainer, console: Console) -> None:
        self._num_steps = config.train.train_iters
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=self._num_steps, figures="")
        self._validation = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_train_start(self, state: TrainState) -> None:
        self._progress.update(self._task, completed=state.step)

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        figures = f"loss {report.loss:.4f}  grad norm {report.grad_norm:.3f}  {report.tokens_per_s:,.0f} tokens/s"
        self._progress.update(self._task, completed=report.step, figures=figures + self._validation)

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        self._validation = f"  validation {report.loss:.4f}"


def is_wanted(config: ConfigContainer, console: Console) -> bool:
    """Whether the bar is drawn: `logger.progress` says so, and the console is a terminal."""
    return config.logger.progress and console.is_terminal
