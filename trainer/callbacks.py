"""What plugs into a run: logging, sinks, publishing, and whatever a user adds.

A callback is told on every rank, in the same order, so it may use collectives. A user's own:

    class Stopwatch(Callback):
        def on_step_end(self, state: TrainState, report: StepReport) -> None:
            print(report.step, report.step_s)

    pretrain(cfg, forward_step, callbacks=[Stopwatch()])
"""

from collections.abc import Sequence
from pathlib import Path

from weightcast.trainer.figures import EvalReport, StepReport
from weightcast.trainer.state import TrainState
from weightcast.trainer.stopping import Stop


class Callback:
    """The moments of a run; a class of its own defines those it wants, the others do nothing."""

    def on_train_start(self, state: TrainState) -> None:
        """Before the first step, after a resume."""

    def on_weights_change(self, state: TrainState) -> None:
        """Before each optimizer step, after its gradients are there: whoever still reads the weights must be done."""

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        """After each step, those that were skipped included; parameters may still have to be gathered
        (`state.gather_parameters()`)."""

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        """After each evaluation."""

    def on_save(self, state: TrainState, folder: Path) -> None:
        """When a checkpoint is whole, which with asynchronous saving is some steps after it was begun."""

    def on_train_end(self, state: TrainState, stop: Stop) -> None:
        """After the last step and its checkpoint; not when the run ends by an error."""


class Callbacks(Callback):
    """Several callbacks as one, told in their order."""

    def __init__(self, members: Sequence[Callback] = ()) -> None:
        self._members = tuple(members)

    def on_train_start(self, state: TrainState) -> None:
        for member in self._members:
            member.on_train_start(state)

    def on_weights_change(self, state: TrainState) -> None:
        for member in self._members:
            member.on_weights_change(state)

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        for member in self._members:
            member.on_step_end(state, report)

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        for member in self._members:
            member.on_eval_end(state, report)

    def on_save(self, state: TrainState, folder: Path) -> None:
        for member in self._members:
            member.on_save(state, folder)

    def on_train_end(self, state: TrainState, stop: Stop) -> None:
        for member in self._members:
            member.on_train_end(state, stop)
