"""Which communication goes on behind computation: the section `comm_overlap`, in Megatron-Bridge's words.

cfg.comm_overlap = CommOverlapConfig(overlap_grad_reduce=True, overlap_param_gather=True)
cfg.comm_overlap = CommOverlapConfig()          # what fits the layout

Where the section is null, nothing overlaps but what `ddp` asks for. `trainer/comm_overlap.py` says what becomes of it.
"""

from dataclasses import dataclass, field
from typing import Any

from weightcast.sync.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class CommOverlapConfig:
    """What overlaps. Fields that are null are chosen by the layout, or are what `ddp` says."""

    tp_comm_overlap: bool = False
    """Gather and scatter the activations of tensor parallelism while matrices are multiplied (Transformer Engine's user
    buffers; needs TP of 2 or more and `model.sequence_parallel`)."""
    tp_comm_overlap_cfg: dict[str, Any] = field(default_factory=dict)
    """With that, how each product overlaps, as Transformer Engine has it: `{proj_fprop: {method: pipeline, num_sm: 24,
    cga_size: 2, num_splits: 4, set_sm_margin: true}}`; a product that is not named has Transformer Engine's choice."""
    tp_comm_bootstrap_backend: str | None = None
    """With that, what the ranks find each other by: `nccl`, `mpi` or `gloo`; null means `nccl`."""

    overlap_p2p_comm: bool | None = None
    """Send to the next pipeline stage while computing: what interleaved stages do, and only they can."""
    batch_p2p_comm: bool | None = None
    """Send and receive in one batch; null does so unless stages are interleaved."""

    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass goes on; null means what `ddp` says, or else wherever there are two or
    more data-parallel ranks and the distributed optimizer."""
    overlap_param_gather: bool | None = None
    """Gather parameters while the next forward pass goes on; null as above."""
    overlap_param_gather_with_optimizer_step: bool | None = None
    """Gather the first chunk's parameters while the optimizer is still at the others'; needs interleaved stages and a
    run without checkpoints. Null means no."""
    align_param_gather: bool | None = None
    """Let all pipeline stages begin their gathers together; null does so with interleaved stages."""
    bucket_size: int | None = None
    """Parameters in one reduction bucket; null means `ddp.bucket_size`."""

    defer_embedding_wgrad_compute: bool = False
    """Put the output layer's weight gradient off to the end of the pipeline, where its rank would wait (needs PP of 2
    or more and fused gradient accumulation)."""
    wgrad_deferral_limit: int = 0
    """With that, micro-batches of which it is put off; 0 means all."""

    overlap_moe_expert_parallel_comm: bool = False
    """Send tokens to their experts while another micro-batch computes (needs EP of 2 or more, 16 bits, and interleaved
    stages where there are stages)."""
    delay_wgrad_compute: bool = False
    """With that, compute weight gradients later, so that there is more to overlap with."""


def overlap_record(given: Any) -> CommOverlapConfig:
    """The section as a record; null is one that overlaps nothing by itself. Raises `ConfigError`."""
    if given is None:
        return CommOverlapConfig()
    if not isinstance(given, CommOverlapConfig):
        raise ConfigError(
            f"comm_overlap={given!r} is no CommOverlapConfig: set its fields, such as "
            "comm_overlap.overlap_grad_reduce=true, or null"
        )
    return given
