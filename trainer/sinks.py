"""Where a run's figures go besides the log: TensorBoard, Weights & Biases, MLflow. Rank 0 alone writes.

Each is an extra of its own, imported when a run asks for it.

    sinks = [stack.enter_context(sink) for sink in open_sinks(cfg)]
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from weightcast.sync.errors import ConfigError
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import ConfigContainer, LoggerConfig
from weightcast.trainer.figures import EvalReport, StepReport
from weightcast.trainer.state import TrainState

_FIGURES: tuple[str, ...] = ("loss", "grad_norm", "lr", "weight_decay", "step_s", "tokens_per_s", "tflops_per_gpu")
_FIGURES += ("memory_bytes", "global_batch_size", "consumed_samples")


def step_figures(report: StepReport) -> dict[str, float]:
    """A step as names and numbers (`train/loss`, `phases/forward_s`, …), without those that are no number."""
    values = {f"train/{name}": float(getattr(report, name)) for name in _FIGURES}
    values |= {f"phases/{name}_s": seconds for name, seconds in report.phases_s.items()}
    if report.peak_share is not None:
        values["train/peak_share"] = report.peak_share
    values["train/skipped"] = float(report.skipped is not None)
    return {name: value for name, value in values.items() if math.isfinite(value)}


class Sink(Callback, ABC):
    """Takes the figures of steps and evaluations; a context manager that closes it."""

    @abstractmethod
    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of `step`."""

    @abstractmethod
    def close(self) -> None:
        """Write what is held back, and end."""

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        self.write(step_figures(report), report.step)

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        self.write({"validation/loss": report.loss}, report.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardSink(Sink):
    """Event files in `logger.tensorboard_dir`."""

    def __init__(self, logger: LoggerConfig) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("logger.tensorboard_dir", "tensorboard") from error
        self._writer: Any = SummaryWriter(logger.tensorboard_dir)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """A run of `logger.wandb_project`, with the whole configuration."""

    def __init__(self, logger: LoggerConfig, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("logger.wandb_project", "wandb") from error
        self._run: Any = wandb.init(
            project=logger.wandb_project,
            entity=logger.wandb_entity,
            name=logger.wandb_exp_name,
            dir=logger.wandb_save_dir,
            config=dict(settings),
        )

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink(Sink):
    """A run of `logger.mlflow_experiment`, with the whole configuration as parameters."""

    def __init__(self, logger: LoggerConfig, settings: Mapping[str, Any]) -> None:
        try:
            import mlflow  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise _missing("logger.mlflow_experiment", "mlflow") from error
        if logger.mlflow_tracking_uri is not None:
            mlflow.set_tracking_uri(logger.mlflow_tracking_uri)
        mlflow.set_experiment(logger.mlflow_experiment)
        mlflow.start_run(run_name=logger.mlflow_run_name)
        mlflow.log_params(
            {f"{section}.{name}": str(value) for section, values in settings.items() for name, value in values.items()}
        )
        self._mlflow: Any = mlflow

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def open_sinks(config: ConfigContainer) -> list[Sink]:
    """The sinks that `config.logger` asks for. Rank 0 alone calls it. Raises `ConfigError` for a missing extra."""
    logger, sinks = config.logger, list[Sink]()
    names = ("train", "optimizer", "scheduler", "ddp", "dataset", "checkpoint", "rng", "dist", "publish")
    settings = {name: asdict(getattr(config, name)) for name in names}
    if logger.tensorboard_dir is not None:
        sinks.append(TensorBoardSink(logger))
    if logger.wandb_project is not None:
        sinks.append(WandbSink(logger, settings))
    if logger.mlflow_experiment is not None:
        sinks.append(MlflowSink(logger, settings))
    return sinks


def _missing(setting: str, extra: str) -> ConfigError:
    return ConfigError(f"{setting} needs a package that is not here: pip install 'weightcast[{extra}]'")
