"""What a step and an evaluation came to: the records that the loop hands to callbacks and writes to the events."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step came to; the same on every rank, except for times and memory."""

    step: int
    loss: float
    """Mean cross entropy per unmasked token of the global batch, before the step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate that the step was taken with."""
    step_s: float
    """Seconds on this rank, without publishing, evaluating and saving."""
    weight_decay: float = 0.0
    """Weight decay that the step was taken with, of parameters that have any."""
    num_tokens: int = 0
    """Unmasked tokens of the global batch."""
    global_batch_size: int = 0
    """Samples of the global batch, which grow while `train.rampup_batch_size` lasts."""
    consumed_samples: int = 0
    """Samples of this step and all before it: the position in the data."""
    tokens_per_s: float = 0.0
    """Tokens of the global batch, masked ones included, per second."""
    tflops_per_gpu: float = 0.0
    """Model TFLOP/s of each rank (`flops.py`); a rank without a GPU counts as one."""
    peak_share: float | None = None
    """These as a share of the card's dense bf16 peak by its data sheet (`peak.py`), where that is known and the weights
    have 16 bits."""
    memory_bytes: int = 0
    """Most memory this rank has held so far: of its GPU by torch, or resident where there is none."""
    phases_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of this rank by phase: `data`, `forward_backward`, in it `forward` (this rank's own model), `optimizer`.
    On a GPU `forward` is the time in which its work was queued; `forward_backward` waits for the loss, and what is left
    of the optimizer's work at the end goes with the next step."""
    skipped: str | None = None
    """Why the step left the weights as they were, where it did."""


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What an evaluation came to; the same on every rank, except for the time."""

    step: int
    loss: float
    """Mean cross entropy per unmasked token over `train.eval_iters` global batches."""
    num_tokens: int
    eval_s: float


def peak_memory_bytes() -> int:
    """The most memory that this process has held: its GPU's by torch's allocator, or resident on the CPU (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
