"""How gradients and parameters travel between data-parallel ranks.

The sections `ddp`, `comm_overlap` and `mixed_precision` may say the same thing; they must agree, and null says nothing.
Pure.

    settings = data_parallel_settings(cfg, replicas=8, interleaved=False)
"""

from dataclasses import dataclass
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.config.comm_overlap import overlap_record
from weightcast.trainer.config.precision import precision_record


@dataclass(frozen=True, slots=True)
class DataParallelSettings:
    """What Megatron's DDP and its optimizer are told, nothing left open but `bucket_size` (null: Megatron's choice)."""

    grad_reduce_in_fp32: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    overlap_param_gather_with_optimizer_step: bool
    align_param_gather: bool
    bucket_size: int | None


def data_parallel_settings(config: ConfigContainer, *, replicas: int, interleaved: bool) -> DataParallelSettings:
    """The settings for `replicas` ranks that reduce gradients (those of data and context parallelism).

    `interleaved` says whether pipeline ranks hold several chunks. Where `comm_overlap` is set and its fields are null,
    what can overlap does, as in Megatron-Bridge. Raises `ConfigError` where two sections contradict each other.
    """
    ddp, overlap = config.ddp, overlap_record(config.comm_overlap)
    can_overlap = config.comm_overlap is not None and replicas > 1 and ddp.use_distributed_optimizer
    reduces = _agreed("overlap_grad_reduce", overlap.overlap_grad_reduce, ddp.overlap_grad_reduce)
    gathers = _agreed("overlap_param_gather", overlap.overlap_param_gather, ddp.overlap_param_gather)
    if reduces is None:
        reduces = can_overlap
    if gathers is None:
        gathers = can_overlap and reduces
    aligned = overlap.align_param_gather
    return DataParallelSettings(
        grad_reduce_in_fp32=reduces_in_fp32(config),
        overlap_grad_reduce=reduces,
        overlap_param_gather=gathers,
        overlap_param_gather_with_optimizer_step=bool(overlap.overlap_param_gather_with_optimizer_step),
        align_param_gather=can_overlap and gathers and interleaved if aligned is None else aligned,
        bucket_size=_agreed("bucket_size", overlap.bucket_size, ddp.bucket_size),
    )


def reduces_in_fp32(config: ConfigContainer) -> bool:
    """Whether gradients of 16-bit parameters are accumulated and reduced in fp32. Raises `ConfigError`."""
    precision = precision_record(config.mixed_precision)
    said = _agreed(
        "grad_reduce_in_fp32",
        precision.grad_reduce_in_fp32,
        config.ddp.grad_reduce_in_fp32,
        section="mixed_precision",
    )
    return True if said is None else said


def _agreed(name: str, one: Any, other: Any, *, section: str = "comm_overlap") -> Any:
    """What either section says, or both alike; None where neither does."""
    if one is not None and other is not None and one != other:
        said = [str(value).lower() for value in (one, other)]
        raise ConfigError(
            f"{section}.{name}={said[0]} and ddp.{name}={said[1]} contradict each other: set one of them to null, or "
            "both alike"
        )
    return other if one is None else one
