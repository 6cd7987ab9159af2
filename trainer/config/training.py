"""How much is trained, from which chance, over which process groups.

cfg.train.train_iters = 10
"""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """How much is trained."""

    micro_batch_size: int = 1
    """Samples that go through the model at once on a rank."""
    global_batch_size: int = 8
    """Samples of one optimizer step, over all data-parallel ranks and micro-batches; of the steps after
    `rampup_batch_size`, where that is set."""
    rampup_batch_size: list[int] | None = None
    """`[start, increment, samples]`: the global batch begins with `start` samples and grows by `increment` at a time,
    at equal distances over the first `samples` samples, up to `global_batch_size`; null has it from the first step."""
    train_iters: int | None = 10
    """Optimizer steps of the whole run, those before a resume included; null where `train_samples` says the length."""
    train_samples: int | None = None
    """Samples of the whole run, those before a resume included, in place of `train_iters` (set that to null). What
    does not fill a last step is left out."""
    iterations_to_skip: list[int] = field(default_factory=list)
    """Steps (1 is the first) whose samples are passed over without training on them, for data that is known bad."""
    nan_action: str = "stop"
    """What a NaN or infinite loss or gradient leads to: `stop` ends the run with an error that says where, `skip`
    leaves the step's update out, goes on and says so. `ddp.check_for_nan_in_grad=false` looks for none."""
    eval_interval: int | None = None
    """Steps between two evaluations on held-out samples; null evaluates never."""
    eval_at_start: bool = False
    """Evaluate before the first step too, where `eval_interval` is set: the loss to compare later ones with."""
    eval_iters: int = 10
    """Global batches of one evaluation. Every evaluation sees the same samples."""
    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1 finish the step, save, and leave with the status 128 + the signal's number."""
    exit_duration_in_mins: float | None = None
    """Minutes after which the run saves and leaves with status 0; null sets no limit."""
    exit_interval: int | None = None
    """Leave, having saved, after each step that is a multiple of this; null goes on to the end."""
    manual_gc: bool = False
    """Collect Python's garbage at fixed steps instead of when the interpreter pleases, so that ranks pause together."""
    manual_gc_interval: int = 0
    """Steps between two collections with `manual_gc`; 0 collects at the beginning alone."""
    manual_gc_eval: bool = True
    """With `manual_gc`, collect before and after each evaluation too."""


@dataclass(slots=True, kw_only=True)
class RNGConfig:
    """Where chance comes from."""

    seed: int = 1234
    """Seeds the order of the samples, new weights, and dropout."""


@dataclass(slots=True, kw_only=True)
class DistributedInitConfig:
    """The process groups."""

    distributed_timeout_minutes: float = 10
    """Minutes that a collective waits for the other ranks before it fails."""
