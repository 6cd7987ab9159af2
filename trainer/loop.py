"""The training loop: forward and backward by Megatron's schedule, one optimizer step, and what follows a step.

`train_step` is the whole of a step and `train` the whole of a run. Which schedule runs (plain, 1F1B, interleaved)
is Megatron's choice by the layout.

    result = train(state, forward_step, batches, validation=held_out, events=events, callbacks=Callbacks())
    result.reports[-1].loss, result.stop.reason
"""

import math
from dataclasses import asdict, dataclass

import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from weightcast.trainer.batch_schedule import batch_schedule
from weightcast.trainer.callbacks import Callbacks
from weightcast.trainer.data.source import BatchSource, batches_of_rank
from weightcast.trainer.errors import DivergedError
from weightcast.trainer.evaluating import evaluate
from weightcast.trainer.events import EventLog
from weightcast.trainer.figures import StepReport, peak_memory_bytes
from weightcast.trainer.flops import flops_of_sample
from weightcast.trainer.garbage import GarbageCollection
from weightcast.trainer.gpt_step import LOSS, ForwardStep
from weightcast.trainer.health import find_nan
from weightcast.trainer.losses import sum_losses
from weightcast.trainer.peak import share_of_run
from weightcast.trainer.saving import Saver
from weightcast.trainer.state import TrainState
from weightcast.trainer.stopping import Stop, Stopping
from weightcast.trainer.timing import StepClock


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to."""

    reports: list[StepReport]
    """One for each step of this process, not of the run before a resume."""
    stop: Stop


def train(
    state: TrainState,
    forward_step: ForwardStep,
    batches: BatchSource,
    *,
    validation: BatchSource | None,
    events: EventLog,
    callbacks: Callbacks,
) -> TrainResult:
    """Train from `state.step` until a reason to stop. Every rank calls it; a collective.

    A step is followed by the callbacks, an evaluation and a checkpoint, where they are due. Raises `DivergedError` and
    `StorageError`, on every rank.
    """
    settings, reports = state.config.train, []

    def evaluate_if(is_due: bool) -> None:
        if is_due:
            garbage.around_evaluation()
            evaluate_and_tell(state, forward_step, validation, events, callbacks)
            garbage.around_evaluation()

    callbacks.on_train_start(state)
    with (
        Stopping(settings) as stopping,
        GarbageCollection(settings) as garbage,
        Saver(state.config, events, callbacks.on_save) as saver,
    ):
        stop = stopping.reason(state.step, state.consumed_samples)
        evaluate_if(settings.eval_at_start and state.step == 0 and stop is None)
        while stop is None:
            with events.phase("step", version=state.step + 1):
                try:
                    report = one_step(state, forward_step, batches, events, callbacks)
                except DivergedError:
                    saver.finish()
                    raise
            reports.append(report)
            events.record("step", **asdict(report))
            callbacks.on_step_end(state, report)
            garbage.after_step(state.step)
            evaluate_if(settings.eval_interval is not None and state.step % settings.eval_interval == 0)
            stop = stopping.reason(state.step, state.consumed_samples)
            saver.after_step(state, is_last=stop is not None)
    callbacks.on_train_end(state, stop)
    return TrainResult(reports, stop)


def evaluate_and_tell(
    state: TrainState,
    forward_step: ForwardStep,
    validation: BatchSource | None,
    events: EventLog,
    callbacks: Callbacks,
) -> None:
    """Evaluate, record it and tell the callbacks. A collective."""
    assert validation is not None, "whoever opens the data sees to it"
    with events.phase("evaluate", version=state.step):
        evaluation = evaluate(state, forward_step, validation)
    events.record("evaluation", **asdict(evaluation))
    callbacks.on_eval_end(state, evaluation)


def one_step(
    state: TrainState, forward_step: ForwardStep, batches: BatchSource, events: EventLog, callbacks: Callbacks
) -> StepReport:
    """The next step: trained, or passed over where `train.iterations_to_skip` names it. A collective."""
    if state.step + 1 not in state.config.train.iterations_to_skip:
        return train_step(state, forward_step, batches, events, callbacks)
    clock = StepClock(events, version=state.step + 1)
    return _finish_step(state, clock, math.nan, math.nan, 0, skipped="train.iterations_to_skip names it")


def train_step(
    state: TrainState,
    forward_step: ForwardStep,
    batches: BatchSource,
    events: EventLog,
    callbacks: Callbacks | None = None,
) -> StepReport:
    """One optimizer step over the next global batch. Every rank calls it; a collective.

    Of `callbacks` it tells `on_weights_change` alone.

    Raises `DivergedError` for a loss or gradient that is no number, unless `train.nan_action` is `skip`.
    """
    clock = StepClock(events, version=state.step + 1)
    with clock.phase("data"):
        micro_batches = batches_of_rank(batches, state.consumed_samples)
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    with clock.phase("forward_backward"):
        losses = get_forward_backward_func()(
            forward_step_func=clock.timed(forward_step),
            data_iterator=[iter(micro_batches) for _ in state.model],
            model=state.model,
            num_microbatches=len(micro_batches),
            seq_length=state.config.dataset.seq_length,
            micro_batch_size=state.config.train.micro_batch_size,
            forward_only=False,
        )
        # Here a GPU is waited for, so the phase is as long as its work.
        total, num_tokens = sum_losses([entry[LOSS] for entry in losses])
    loss = total / num_tokens if num_tokens else math.nan
    fault = find_nan(state.model, loss) if state.config.ddp.check_for_nan_in_grad else None
    if fault is not None:
        if state.config.train.nan_action == "stop":
            raise DivergedError(
                f"step {state.step + 1}: {fault}; the weights are as before it. Resume from an earlier checkpoint with "
                f"a lower optimizer.lr, or pass over what is bad with train.nan_action=skip or "
                f"train.iterations_to_skip=[{state.step + 1}]"
            )
        return _finish_step(state, clock, loss, math.nan, num_tokens, skipped=fault)
    if callbacks is not None:
        callbacks.on_weights_change(state)
    with clock.phase("optimizer"):
        was_taken, grad_norm, _ = state.optimizer.step()
    if not was_taken:
        scale = float(state.optimizer.get_loss_scale())
        overflow = f"a gradient overflows fp16; the scale of the loss is {scale:g} now"
        return _finish_step(state, clock, loss, math.nan, num_tokens, skipped=overflow)
    return _finish_step(state, clock, loss, float(grad_norm), num_tokens)


def _finish_step(
    state: TrainState, clock: StepClock, loss: float, grad_norm: float, num_tokens: float, skipped: str | None = None
) -> StepReport:
    """Move on by one step; the schedule moves only when the weights did, as Megatron's does."""
    config, step_s = state.config, clock.step_s
    samples = batch_schedule(config).size_at(state.consumed_samples)
    groups = state.optimizer.param_groups
    lr, weight_decay = float(groups[0]["lr"]), max(float(group["weight_decay"]) for group in groups)
    state.step += 1
    state.consumed_samples += samples
    if skipped is None:
        state.scheduler.step(samples)
    flops = flops_of_sample(state.provider, config.dataset.seq_length) * samples
    tflops = flops / step_s / dist.get_world_size() / 1e12
    return StepReport(
        step=state.step,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        step_s=step_s,
        weight_decay=weight_decay,
        num_tokens=int(num_tokens),
        global_batch_size=samples,
        consumed_samples=state.consumed_samples,
        tokens_per_s=samples * config.dataset.seq_length / step_s,
        tflops_per_gpu=tflops,
        peak_share=share_of_run(tflops, state.provider),
        memory_bytes=peak_memory_bytes(),
        phases_s=clock.phases_s,
        skipped=skipped,
    )
