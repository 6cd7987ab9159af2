"""A run in the log of rank 0 (`logging`, level INFO): a line each `logger.log_interval` steps, and what else happens.

pretrain adds StepLog(cfg) to the callbacks.
"""

import logging
from pathlib import Path

from weightcast.trainer.batch_schedule import batch_schedule
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.figures import EvalReport, StepReport
from weightcast.trainer.state import TrainState
from weightcast.trainer.stopping import Stop

logger = logging.getLogger(__name__)


class StepLog(Callback):
    """Writes the log lines."""

    def __init__(self, config: ConfigContainer) -> None:
        self._interval = config.logger.log_interval
        self._batches = batch_schedule(config)
        self._last_step = self._batches.last_step()

    def on_train_start(self, state: TrainState) -> None:
        self._last_step = self._batches.last_step(state.step, state.consumed_samples)

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        if report.skipped is not None:
            logger.warning("step %d of %d skipped: %s", report.step, self._last_step, report.skipped)
        elif report.step % self._interval == 0:
            logger.info(
                "step %d of %d: loss %.4f, gradient norm %.3f, lr %.2e, %d samples, %.2f s, %.0f tokens/s, "
                "%.3g TFLOP/s a GPU%s, %.2f GB",
                report.step,
                self._last_step,
                report.loss,
                report.grad_norm,
                report.lr,
                report.global_batch_size,
                report.step_s,
                report.tokens_per_s,
                report.tflops_per_gpu,
                "" if report.peak_share is None else f" ({report.peak_share:.1%} of its peak)",
                report.memory_bytes / 1e9,
            )

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        logger.info("evaluation after step %d: loss %.4f, %.2f s", report.step, report.loss, report.eval_s)

    def on_save(self, state: TrainState, folder: Path) -> None:
        logger.info("saved %s", folder)

    def on_train_end(self, state: TrainState, stop: Stop) -> None:
        logger.info("training ends: %s", stop.reason)
