"""The optimizer, its learning rate over the steps, and the reduction of gradients.

cfg.optimizer.lr = 3e-4
cfg.scheduler.lr_decay_style = "cosine"
"""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, Megatron-Core's own. With bf16 parameters it keeps fp32 masters."""

    optimizer: str = "adam"
    """`adam`, with decoupled weight decay (AdamW)."""
    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 clips nothing."""


@dataclass(slots=True, kw_only=True)
class SchedulerConfig:
    """The learning rate and the weight decay over the steps (`lr_schedule.py`)."""

    lr_decay_style: str = "cosine"
    """`constant`, `linear`, `cosine`, `inverse-square-root` or `WSD` (warm-up, stable, decay)."""
    lr_decay_iters: int | None = None
    """Step at which `min_lr` is reached; null means the end of the run."""
    lr_decay_samples: int | None = None
    """The same in samples, instead of `lr_decay_iters`."""
    lr_wsd_decay_style: str = "exponential"
    """How the last part of WSD falls: `exponential`, `linear`, `cosine` or `minus_sqrt`."""
    lr_wsd_decay_iters: int | None = None
    """Steps of that last part, before `lr_decay_iters`; WSD needs it or `lr_wsd_decay_samples`."""
    lr_wsd_decay_samples: int | None = None
    """The same in samples."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up before the decay. The first of them has the rate `lr_warmup_init`."""
    lr_warmup_samples: int = 0
    """The same in samples, instead of `lr_warmup_iters`."""
    lr_warmup_fraction: float | None = None
    """The same as a share of the whole schedule (`lr_decay_iters` or `lr_decay_samples`)."""
    lr_warmup_init: float = 0.0
    """Learning rate at which the warm-up starts."""
    start_weight_decay: float | None = None
    """Weight decay at the first step; null means `optimizer.weight_decay`."""
    end_weight_decay: float | None = None
    """Weight decay at the end of the run; null means `optimizer.weight_decay`."""
    weight_decay_incr_style: str = "constant"
    """How it goes from one to the other: `constant` (they are the same), `linear` or `cosine`."""


@dataclass(slots=True, kw_only=True)
class DistributedDataParallelConfig:
    """Megatron-Core's gradient buffers and their reduction over the data-parallel ranks."""

    use_distributed_optimizer: bool = True
    """Shard the optimizer's state and step over the data-parallel ranks."""
    grad_reduce_in_fp32: bool | None = None
    """Accumulate and reduce gradients in fp32 when the parameters have 16 bits; null means what `mixed_precision` says,
    or else true."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass goes on (useful on GPUs); null means what `comm_overlap` says."""
    overlap_param_gather: bool | None = None
    """Gather parameters while the next forward pass goes on; needs `use_distributed_optimizer` and
    `overlap_grad_reduce`. Null means what `comm_overlap` says."""
    check_for_nan_in_grad: bool = True
    """Look for NaN and infinite losses and gradients before each update; `train.nan_action` says what then happens."""
    bucket_size: int | None = None
    """Parameters in one reduction bucket; null lets Megatron-Core choose, as `comm_overlap` does."""
