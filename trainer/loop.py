"""The training loop: forward and backward by Megatron's schedule, one optimizer step, and what follows a step.

`train_step` is the whole of a step and `train` the whole of a run. Which schedule runs (plain, 1F1B, interleaved)
is Megatron's choice by the layout.

    for report in train(state, forward_step, batches, events, after_step): ...
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from weightcast.trainer.data.context_parallel import cut_along_sequence
from weightcast.trainer.data.samples import Batch, Batches
from weightcast.trainer.events import EventLog
from weightcast.trainer.gpt_step import LOSS, ForwardStep
from weightcast.trainer.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step came to; the same on every rank, except for the time."""

    step: int
    loss: float
    """Mean cross entropy per unmasked token of the global batch, before the step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate that the step was taken with."""
    step_s: float
    """Seconds on this rank, without publishing and saving."""


def train(
    state: TrainState,
    forward_step: ForwardStep,
    batches: Batches,
    events: EventLog,
    after_step: Callable[[StepReport], None],
) -> list[StepReport]:
    """Train from `state.step` to `train.train_iters`, calling `after_step` with each step. Every rank calls it."""
    reports = []
    while state.step < state.config.train.train_iters:
        with events.phase("step", version=state.step + 1):
            report = train_step(state, forward_step, batches, events)
        reports.append(report)
        events.record("step", **asdict(report))
        if dist.get_rank() == 0 and report.step % state.config.logger.log_interval == 0:
            logger.info(
                "step %d of %d: loss %.4f, gradient norm %.3f, lr %.2e, %.2f s",
                report.step,
                state.config.train.train_iters,
                report.loss,
                report.grad_norm,
                report.lr,
                report.step_s,
            )
        after_step(report)
    return reports


def train_step(state: TrainState, forward_step: ForwardStep, batches: Batches, events: EventLog) -> StepReport:
    """One optimizer step over the next global batch. Every rank calls it; a collective."""
    start_s, version = time.monotonic(), state.step + 1
    micro_batches = batches_of_rank(batches, state.consumed_samples)
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    with events.phase("forward_backward", version=version):
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in state.model],
            model=state.model,
            num_microbatches=len(micro_batches),
            seq_length=state.config.dataset.seq_length,
            micro_batch_size=state.config.train.micro_batch_size,
            forward_only=False,
        )
    lr = float(state.optimizer.param_groups[0]["lr"])
    with events.phase("optimizer", version=version):
        _, grad_norm, _ = state.optimizer.step()
    state.scheduler.step(1)
    state.step = version
    state.consumed_samples += state.config.train.global_batch_size
    loss = mean_loss([entry[LOSS] for entry in losses])
    return StepReport(version, loss, float(grad_norm), lr, time.monotonic() - start_s)


def batches_of_rank(batches: Batches, consumed_samples: int) -> list[Batch]:
    """The micro-batches that this rank computes of the step that starts after `consumed_samples` samples."""
    whole = batches.of_step(
        consumed_samples=consumed_samples,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return [cut_along_sequence(batch, rank=rank, size=size) for batch in whole]


def mean_loss(parts: list[torch.Tensor]) -> float:
    """The mean loss per token over the global batch, on every rank. A collective.

    `parts` are [sum of losses, number of tokens] of each micro-batch on the last pipeline stage, and empty on the
    others.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for part in parts:
        total += part
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, src=last_stage, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total[0] / total[1])
