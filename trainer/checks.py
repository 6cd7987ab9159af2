"""What must hold between settings, checked before any process group is made.

`check_config` is pure: it looks at the configuration and the number of ranks, and raises the first contradiction
as a `ConfigError` that says what to change.

    layout = check_config(cfg, world_size=4)
    layout.num_microbatches
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from weightcast.sync import DeltaMode
from weightcast.sync.errors import ConfigError
from weightcast.sync.quantize_rules import KINDS
from weightcast.trainer.config import ConfigContainer, delta_mode

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
MIXED_PRECISION = (None, "bf16_mixed", "fp32")
OPTIMIZERS = ("adam",)
QUANTIZE = ("none", *KINDS)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks and a global batch are divided."""

    world_size: int
    data_parallel_size: int
    num_microbatches: int
    """Micro-batches that each data-parallel rank runs in one optimizer step."""


def check_config(config: ConfigContainer, *, world_size: int) -> Layout:
    """Check all sections against each other and against `world_size` ranks. Raises `ConfigError`."""
    _check_positive(config)
    layout = _check_layout(config, world_size)
    _check_model(config, layout)
    _check_training(config)
    _check_checkpoint(config)
    _check_publish(config, world_size)
    return layout


def _check_positive(config: ConfigContainer) -> None:
    values: dict[str, float | None] = {
        "model.tensor_model_parallel_size": config.model.tensor_model_parallel_size,
        "model.pipeline_model_parallel_size": config.model.pipeline_model_parallel_size,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.global_batch_size": config.train.global_batch_size,
        "train.train_iters": config.train.train_iters,
        "dataset.seq_length": config.dataset.seq_length,
        "dataset.max_bytes": config.dataset.max_bytes,
        "checkpoint.save_interval": config.checkpoint.save_interval,
        "checkpoint.most_recent_k": config.checkpoint.most_recent_k,
        "logger.log_interval": config.logger.log_interval,
        "publish.every": config.publish.every,
        "publish.wait_timeout_s": config.publish.wait_timeout_s,
        "publish.timeout_s": config.publish.timeout_s,
        "dist.distributed_timeout_minutes": config.dist.distributed_timeout_minutes,
    }
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}; it must be more than 0")


def _check_layout(config: ConfigContainer, world_size: int) -> Layout:
    tensor, pipeline = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    ranks = tensor * pipeline
    if world_size % ranks:
        raise ConfigError(
            f"the layout TP={tensor} x PP={pipeline} needs a multiple of {ranks} ranks, and there are {world_size}: "
            f"start with `torchrun --nproc-per-node {ranks}`, or lower model.tensor_model_parallel_size or "
            f"model.pipeline_model_parallel_size"
        )
    replicas = world_size // ranks
    samples = config.train.micro_batch_size * replicas
    if config.train.global_batch_size % samples:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} cannot be divided into micro-batches of "
            f"{config.train.micro_batch_size} on {replicas} data-parallel rank(s): make it a multiple of {samples}"
        )
    return Layout(world_size, replicas, config.train.global_batch_size // samples)


def _check_model(config: ConfigContainer, layout: Layout) -> None:
    model, sequence = config.model, config.dataset.seq_length
    if getattr(model, "context_parallel_size", 1) != 1:
        raise ConfigError(
            f"context_parallel_size={model.context_parallel_size}: batches are not split along the sequence yet; use 1 "
            "and tensor parallelism with sequence_parallel for long sequences"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise ConfigError("model.sequence_parallel=true needs model.tensor_model_parallel_size of 2 or more")
    if model.sequence_parallel and sequence % model.tensor_model_parallel_size:
        raise ConfigError(
            f"model.sequence_parallel splits dataset.seq_length={sequence} over TP="
            f"{model.tensor_model_parallel_size}: make the length a multiple of it"
        )
    chunks, stages = model.virtual_pipeline_model_parallel_size, model.pipeline_model_parallel_size
    if chunks is None:
        return
    if stages == 1:
        raise ConfigError("model.virtual_pipeline_model_parallel_size needs model.pipeline_model_parallel_size >= 2")
    if layout.num_microbatches % stages:
        raise ConfigError(
            f"the interleaved schedule needs micro-batches in multiples of PP={stages}, and a step has "
            f"{layout.num_microbatches}: raise train.global_batch_size or lower train.micro_batch_size"
        )


def _check_training(config: ConfigContainer) -> None:
    _check_choice("optimizer.optimizer", config.optimizer.optimizer, OPTIMIZERS)
    _check_choice("scheduler.lr_decay_style", config.scheduler.lr_decay_style, LR_DECAY_STYLES)
    _check_choice("mixed_precision", config.mixed_precision, MIXED_PRECISION)
    if not 0 <= config.optimizer.min_lr <= config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={config.optimizer.min_lr} must lie between 0 and optimizer.lr={config.optimizer.lr}"
        )
    if not 0 <= config.scheduler.lr_warmup_init <= config.optimizer.lr:
        raise ConfigError(f"scheduler.lr_warmup_init must lie between 0 and optimizer.lr={config.optimizer.lr}")
    if config.optimizer.clip_grad < 0:
        raise ConfigError(f"optimizer.clip_grad={config.optimizer.clip_grad}: use 0 to clip nothing")
    decay = decay_iters(config)
    if not 0 <= config.scheduler.lr_warmup_iters < decay:
        raise ConfigError(
            f"scheduler.lr_warmup_iters={config.scheduler.lr_warmup_iters} must be fewer than the {decay} steps "
            f"of the schedule (scheduler.lr_decay_iters, or else train.train_iters)"
        )
    ddp = config.ddp
    if ddp.overlap_param_gather and not (ddp.overlap_grad_reduce and ddp.use_distributed_optimizer):
        raise ConfigError(
            "ddp.overlap_param_gather needs ddp.overlap_grad_reduce=true and ddp.use_distributed_optimizer=true"
        )


def decay_iters(config: ConfigContainer) -> int:
    """Steps of the learning-rate schedule."""
    given = config.scheduler.lr_decay_iters
    return given if given is not None else config.train.train_iters


def _check_choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        choices = ", ".join("null" if choice is None else choice for choice in allowed)
        raise ConfigError(f"{name}={value!r} is not one of: {choices}")


def _check_checkpoint(config: ConfigContainer) -> None:
    if config.checkpoint.save_interval is not None and config.checkpoint.save is None:
        raise ConfigError("checkpoint.save_interval is set and checkpoint.save is not: say where to save")
    for name in dict.fromkeys(config.dataset.files):
        if not Path(name).is_file():
            raise ConfigError(f"dataset.files: there is no file {name!r}")


def _check_publish(config: ConfigContainer, world_size: int) -> None:
    publish = config.publish
    if publish.wait_for < 0:
        raise ConfigError(f"publish.wait_for={publish.wait_for} is a number of engines, 0 or more")
    if publish.wait_for and publish.to is None:
        raise ConfigError("publish.wait_for is set and publish.to is not: say at which address engines subscribe")
    _check_choice("publish.quantize", publish.quantize, QUANTIZE)
    if publish.quantize != "none" and publish.to is None:
        raise ConfigError("publish.quantize is set and publish.to is not: say at which address engines subscribe")
    if publish.quantize == "none" and (publish.modules_to_not_convert or publish.engine_config is not None):
        raise ConfigError(
            "publish.modules_to_not_convert and publish.engine_config are for quantised publishing: set "
            "publish.quantize to fp8_block or fp8_tensor, or leave them out"
        )
    if publish.to is not None and publish.to.endswith(":0") and world_size > 1:
        raise ConfigError(f"publish.to={publish.to!r}: all ranks need the same address, so name a port that is free")
    if delta_mode(publish) not in get_args(DeltaMode):
        raise ConfigError(f"publish.delta={publish.delta!r} is not known; use one of {', '.join(get_args(DeltaMode))}")
    told = [name for name in ("report_log", "metrics_port") if getattr(publish, name) is not None]
    if told and publish.to is None:
        raise ConfigError(f"publish.{told[0]} is set and publish.to is not: without versions there are no reports")
    if publish.metrics_port is not None and not 0 <= publish.metrics_port <= 65535:
        raise ConfigError(
            f"publish.metrics_port={publish.metrics_port} is no port; use 1 to 65535, or 0 for a free one"
        )
