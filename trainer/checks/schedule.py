"""Whether the learning rate, the weight decay and the points at which a run evaluates and leaves make sense.

check_schedule(config)
"""

from weightcast.sync.errors import ConfigError
from weightcast.trainer.batch_schedule import batch_schedule
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.lr_schedule import (
    LR_DECAY_STYLES,
    WEIGHT_DECAY_STYLES,
    WSD,
    WSD_DECAY_STYLES,
    schedule_lengths,
    weight_decays,
)

NAN_ACTIONS = ("stop", "skip")


def check_schedule(config: ConfigContainer) -> None:
    """Learning rate and weight decay over the steps, and what interrupts them."""
    given = config.scheduler
    check_choice("scheduler.lr_decay_style", given.lr_decay_style, LR_DECAY_STYLES)
    check_choice("scheduler.lr_wsd_decay_style", given.lr_wsd_decay_style, WSD_DECAY_STYLES)
    check_choice("scheduler.weight_decay_incr_style", given.weight_decay_incr_style, WEIGHT_DECAY_STYLES)
    if not 0 <= config.optimizer.min_lr <= config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={config.optimizer.min_lr} must lie between 0 and optimizer.lr={config.optimizer.lr}"
        )
    if not 0 <= given.lr_warmup_init <= config.optimizer.lr:
        raise ConfigError(f"scheduler.lr_warmup_init must lie between 0 and optimizer.lr={config.optimizer.lr}")
    _check_lengths(config)
    _check_weight_decay(config)
    _check_interruptions(config)


def _check_lengths(config: ConfigContainer) -> None:
    given, lengths = config.scheduler, schedule_lengths(config)
    fraction = given.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        raise ConfigError(f"scheduler.lr_warmup_fraction={fraction} is a share of the schedule, from 0 to below 1")
    if not 0 <= lengths.warmup_samples < lengths.decay_samples:
        batches = batch_schedule(config)
        raise ConfigError(
            f"the warm-up of {lengths.warmup_samples} samples (scheduler.lr_warmup_iters, _samples or _fraction) must "
            f"be 0 or more, and shorter than the {batches.steps_within(lengths.decay_samples)} steps or "
            f"{lengths.decay_samples} samples of the schedule (scheduler.lr_decay_iters or _samples, or else "
            f"train.train_iters or train_samples)"
        )
    if given.lr_decay_style != WSD:
        return
    falling = lengths.wsd_decay_samples
    if falling is None or not 0 < falling <= lengths.decay_samples - lengths.warmup_samples:
        raise ConfigError(
            f"scheduler.lr_decay_style=WSD needs scheduler.lr_wsd_decay_iters (or _samples), the length of its last "
            f"part: more than 0 and at most the {lengths.decay_samples - lengths.warmup_samples} samples after the "
            f"warm-up, not {falling}"
        )


def _check_weight_decay(config: ConfigContainer) -> None:
    start, end = weight_decays(config)
    if not 0 <= start <= end:
        raise ConfigError(f"weight decay goes from {start} to {end}: neither below 0, nor down, is known to Megatron")
    if start != end and config.scheduler.weight_decay_incr_style == "constant":
        raise ConfigError(
            f"weight decay goes from {start} to {end} and scheduler.weight_decay_incr_style is constant: use linear or "
            f"cosine"
        )


def _check_interruptions(config: ConfigContainer) -> None:
    train = config.train
    check_choice("train.nan_action", train.nan_action, NAN_ACTIONS)
    check_positive(
        {
            "train.eval_interval": train.eval_interval,
            "train.eval_iters": train.eval_iters,
            "train.exit_duration_in_mins": train.exit_duration_in_mins,
            "train.exit_interval": train.exit_interval,
        }
    )
    if train.eval_at_start and train.eval_interval is None:
        raise ConfigError("train.eval_at_start is set and train.eval_interval is not: set it too, in steps")
    if train.manual_gc_interval < 0:
        raise ConfigError(f"train.manual_gc_interval={train.manual_gc_interval} is a number of steps, 0 or more")
    if train.manual_gc_interval and not train.manual_gc:
        raise ConfigError("train.manual_gc_interval is set and train.manual_gc is not: set it to true")
    last_step = batch_schedule(config).last_step()
    wrong = [step for step in train.iterations_to_skip if not 1 <= step <= last_step]
    if wrong:
        raise ConfigError(f"train.iterations_to_skip names step {wrong[0]}, and the run has the steps 1 to {last_step}")
