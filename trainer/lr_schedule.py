"""Warm-up, decay and weight decay as numbers of samples, from whichever unit the settings give them in. Pure.

Megatron's scheduler counts samples, so that warm-up by steps, by samples and by a share of the schedule are one thing.
Steps are those of this run: while the batch size ramps up they are shorter in samples, and end where they should.

    lengths = schedule_lengths(cfg)
    lengths.warmup_samples, lengths.decay_samples
"""

from dataclasses import dataclass

from weightcast.sync.errors import ConfigError
from weightcast.trainer.batch_schedule import BatchSchedule, batch_schedule
from weightcast.trainer.config import ConfigContainer

WSD = "WSD"
LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", WSD)
WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
WEIGHT_DECAY_STYLES = ("constant", "linear", "cosine")


@dataclass(frozen=True, slots=True)
class ScheduleLengths:
    """How long each part of the schedule is, in samples."""

    warmup_samples: int
    decay_samples: int
    """From the first step to the one with `min_lr`, the warm-up included."""
    wsd_decay_samples: int | None
    """The falling part of WSD, the last of `decay_samples`; `None` for other styles."""
    weight_decay_samples: int


def schedule_lengths(config: ConfigContainer) -> ScheduleLengths:
    """The lengths that `config.scheduler` asks for. Raises `ConfigError` where two settings say the same length."""
    given, batches = config.scheduler, batch_schedule(config)
    _check_one_unit(config)
    whole = decay = batches.num_samples()
    if given.lr_decay_iters is not None:
        decay = batches.samples_of(given.lr_decay_iters)
    elif given.lr_decay_samples is not None:
        decay = given.lr_decay_samples
    if given.lr_warmup_fraction is not None:
        warmup = int(given.lr_warmup_fraction * decay)
    else:
        warmup = given.lr_warmup_samples or batches.samples_of(given.lr_warmup_iters)
    falling = _falling(config, batches, decay) if given.lr_decay_style == WSD else None
    return ScheduleLengths(warmup, decay, falling, whole)


def _falling(config: ConfigContainer, batches: BatchSchedule, decay: int) -> int | None:
    """The last part of WSD: the samples of the last steps before the one that ends the decay."""
    steps = config.scheduler.lr_wsd_decay_iters
    if steps is None:
        return config.scheduler.lr_wsd_decay_samples
    all_steps = batches.steps_within(decay)
    if steps > all_steps:
        return steps * batches.global_batch_size  # more than there are, for `check_schedule` to refuse
    return batches.samples_of(all_steps) - batches.samples_of(all_steps - steps)


def weight_decays(config: ConfigContainer) -> tuple[float, float]:
    """The weight decay at the first step and at the last."""
    given, flat = config.scheduler, config.optimizer.weight_decay
    start, end = given.start_weight_decay, given.end_weight_decay
    return (flat if start is None else start, flat if end is None else end)


def _check_one_unit(config: ConfigContainer) -> None:
    given = config.scheduler
    groups = (
        ("lr_decay_iters", "lr_decay_samples"),
        ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    )
    for names in groups:
        said = [name for name in names if getattr(given, name)]
        if len(said) > 1:
            raise ConfigError(
                f"{' and '.join(f'scheduler.{name}' for name in said)} say the same thing in different units: keep one"
            )
