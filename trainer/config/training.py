"""How much is trained, from which chance, over which process groups.

cfg.train.train_iters = 10
"""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """How much is trained."""

    micro_batch_size: int = 1
    """Samples that go through the model at once on a rank."""
    global_batch_size: int = 8
    """Samples of one optimizer step, over all data-parallel ranks and micro-batches."""
    train_iters: int = 10
    """Optimizer steps of the whole run, those before a resume included."""


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
