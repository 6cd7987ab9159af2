"""Trainings with something happening on the way, on each rank: NaN losses, signals, full disks, a sudden death."""

import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.trainer.runs import sum_of

from weightcast.bridges import AutoBridge
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.errors import WeightcastError
from weightcast.trainer import gpt_step
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.data.samples import Batch
from weightcast.trainer.figures import EvalReport, StepReport
from weightcast.trainer.gpt_step import LossFunction
from weightcast.trainer.overrides import load_config
from weightcast.trainer.pretrain import run_training
from weightcast.trainer.state import TrainState
from weightcast.trainer.stopping import Stop

SMALL_FILE_BYTES = 60_000  # more than random states have, less than the weights


class Watch(Callback):
    """Writes down what it is told, and makes the trouble that a run's `trouble` names after step `at`, on `rank`."""

    def __init__(self, trouble: str | None, at: int, rank: int) -> None:
        self._trouble = trouble if dist.get_rank() == rank else None
        self._at = at
        self.told: list[str] = []
        self.evaluations: list[float] = []
        self.saved: list[str] = []
        self.weights: list[float] = []

    def on_train_start(self, state: TrainState) -> None:
        self.told.append(f"start {state.step}")

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        state.gather_parameters()
        self.weights.append(sum(float(p.double().sum()) for chunk in state.model for p in chunk.parameters()))
        self.told.append(f"step {report.step}")
        if self._trouble == "signal" and report.step == self._at:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self._trouble == "full disk" and report.step == self._at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, resource.RLIM_INFINITY))
        if self._trouble == "death" and report.step > self._at and self.saved:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        self.evaluations.append(report.loss)
        self.told.append(f"eval {report.step}")

    def on_save(self, state: TrainState, folder: Path) -> None:
        self.saved.append(folder.name)
        self.told.append(f"save {folder.name}")

    def on_train_end(self, state: TrainState, stop: Stop) -> None:
        self.told.append(f"end {state.step}")


class NanAt:
    """A `forward_step` whose loss is NaN in the step after `at`, on `rank` alone."""

    def __init__(self, watch: Watch, at: int, rank: int) -> None:
        self._watch, self._at, self._is_here = watch, at, dist.get_rank() == rank

    def __call__(self, data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, LossFunction]:
        output, loss = gpt_step.forward_step(data, model)
        steps_done = sum(item.startswith("step") for item in self._watch.told)
        return (output * math.nan if self._is_here and steps_done == self._at else output), loss


def train_watched(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each run of `words`, with its `trouble` after step `at` on `rank`, and settings of its `provider`."""
    results: dict[str, Any] = {}
    for name, run in runs.items():
        watch = Watch(run.get("trouble"), run.get("at", 0), run.get("rank", 0))
        forward_step: Any = gpt_step.forward_step
        if run.get("trouble") == "nan":
            forward_step = NanAt(watch, run["at"], run.get("rank", 0))
        results[name] = _train(run, forward_step, watch) | {
            "told": watch.told,
            "evaluations": watch.evaluations,
            "saved": watch.saved,
            "sums": watch.weights,
        }
        destroy_model_parallel()
    return results


def _train(run: dict[str, Any], forward_step: Any, watch: Watch) -> dict[str, Any]:
    config = load_config(run["words"])
    bridge = None
    if "provider" in run:
        bridge = AutoBridge.from_hf_pretrained(config.model.hf_path)
        provider = bridge.to_megatron_provider()
        for name, value in ({"calculate_per_token_loss": True} | run["provider"]).items():
            setattr(provider, name, value)
        provider.finalize()
        config.model = provider
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        result = run_training(config, forward_step, bridge=bridge, callbacks=[watch])
    except WeightcastError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    names: tuple[str, ...] = ("loss", "grad_norm", "lr", "weight_decay", "skipped", "num_tokens")
    names += ("global_batch_size", "consumed_samples")
    figures = {name: [getattr(report, name) for report in result.reports] for name in names}
    last = result.reports[-1] if result.reports else None
    return figures | {
        "stop": result.stop.reason,
        "status": result.stop.status,
        "is_complete": result.stop.is_complete,
        "weights": sum_of(config.checkpoint.export_hf),
        "rates": None if last is None else [last.tokens_per_s, last.tflops_per_gpu, last.memory_bytes],
        "phases": [] if last is None else sorted(last.phases_s),
    }
