"""Whether ranks, model and global batch can be divided as asked.

layout = check_layout(config, world_size=4)
"""

from dataclasses import dataclass
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.trainer.batch_schedule import batch_schedule
from weightcast.trainer.checks.common import check_positive
from weightcast.trainer.config import ConfigContainer


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks and a global batch are divided."""

    world_size: int
    data_parallel_size: int
    num_microbatches: int
    """Micro-batches that each data-parallel rank runs in one optimizer step, after a ramp-up."""


def check_layout(config: ConfigContainer, world_size: int) -> Layout:
    """The ranks and a global batch, divided."""
    model = config.model
    check_positive(
        {
            "model.tensor_model_parallel_size": model.tensor_model_parallel_size,
            "model.pipeline_model_parallel_size": model.pipeline_model_parallel_size,
            "model.context_parallel_size": model.context_parallel_size,
            "model.expert_model_parallel_size": model.expert_model_parallel_size,
            "model.expert_tensor_parallel_size": model.expert_tensor_parallel_size,
            "train.micro_batch_size": config.train.micro_batch_size,
            "train.global_batch_size": config.train.global_batch_size,
            "train.train_iters": config.train.train_iters,
            "train.train_samples": config.train.train_samples,
        }
    )
    check_length(config)
    tensor, pipeline, context = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    ranks = tensor * pipeline * context
    if world_size % ranks:
        raise ConfigError(
            f"the layout TP={tensor} x PP={pipeline} x CP={context} needs a multiple of {ranks} ranks, and there are "
            f"{world_size}: start with `torchrun --nproc-per-node {ranks}`, or lower model.tensor_model_parallel_size, "
            f"model.pipeline_model_parallel_size or model.context_parallel_size"
        )
    _check_experts(model, world_size)
    replicas = world_size // ranks
    return Layout(world_size, replicas, _divide_batches(config, replicas))


def check_length(config: ConfigContainer) -> None:
    """One setting says how long the run is, and the ramp-up reaches the whole batch."""
    train = config.train
    if train.train_iters is not None and train.train_samples is not None:
        raise ConfigError(
            f"train.train_iters={train.train_iters} and train.train_samples={train.train_samples} both say how long "
            "the run is: set one of them to null, such as train.train_iters=null"
        )
    if train.train_iters is None and train.train_samples is None:
        raise ConfigError("nothing says how long the run is: set train.train_iters (steps) or train.train_samples")
    if train.rampup_batch_size is not None:
        _check_ramp_up(train.rampup_batch_size, train.global_batch_size)
    if batch_schedule(config).last_step() < 1:
        first = batch_schedule(config).size_at(0)
        raise ConfigError(
            f"train.train_samples={train.train_samples} is less than the {first} samples of the first step: raise it, "
            "or lower train.global_batch_size"
        )


def _check_ramp_up(ramp_up: list[int], whole: int) -> None:
    if len(ramp_up) != 3 or min(ramp_up) < 1:
        raise ConfigError(
            f"train.rampup_batch_size={ramp_up} must be three numbers above 0: [start, increment, samples], such as "
            "[32,32,100000]"
        )
    start, increment, _ = ramp_up
    if start >= whole or (whole - start) % increment:
        raise ConfigError(
            f"train.rampup_batch_size={ramp_up} does not go from {start} in steps of {increment} up to "
            f"train.global_batch_size={whole}: begin below it, with an increment that divides the difference"
        )


def _divide_batches(config: ConfigContainer, replicas: int) -> int:
    """Micro-batches a rank of a step after the ramp-up; before it, too, every batch is divided evenly."""
    samples = config.train.micro_batch_size * replicas
    named = {"train.global_batch_size": config.train.global_batch_size}
    if config.train.rampup_batch_size is not None:
        start, increment, _ = config.train.rampup_batch_size
        named |= {"the start of train.rampup_batch_size": start, "the increment of train.rampup_batch_size": increment}
    for name, size in named.items():
        if size % samples:
            raise ConfigError(
                f"{name}={size} cannot be divided into micro-batches of {config.train.micro_batch_size} on {replicas} "
                f"data-parallel rank(s): make it a multiple of {samples}"
            )
    return config.train.global_batch_size // samples


def _check_experts(model: Any, world_size: int) -> None:
    given = model.expert_tensor_parallel_size
    expert, matrices = model.expert_model_parallel_size, given or model.tensor_model_parallel_size
    ranks = expert * matrices * model.pipeline_model_parallel_size
    if world_size % ranks:
        raise ConfigError(
            f"experts over EP={expert} x ETP={matrices} x PP={model.pipeline_model_parallel_size} need a multiple of "
            f"{ranks} ranks, and there are {world_size}: start with `torchrun --nproc-per-node {ranks}`, or lower "
            f"model.expert_model_parallel_size or model.expert_tensor_parallel_size (null means TP)"
        )


def check_model(config: ConfigContainer, layout: Layout) -> None:
    """Sequence, stages and micro-batches fit the layout."""
    model, sequence = config.model, config.dataset.seq_length
    pieces = 2 * model.context_parallel_size
    if model.context_parallel_size > 1 and sequence % pieces:
        raise ConfigError(
            f"dataset.seq_length={sequence} is not cut into {pieces} chunks, two for each of the "
            f"model.context_parallel_size={model.context_parallel_size} ranks: make it a multiple of {pieces}"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise ConfigError("model.sequence_parallel=true needs model.tensor_model_parallel_size of 2 or more")
    shares = model.tensor_model_parallel_size * model.context_parallel_size
    if model.sequence_parallel and sequence % shares:
        raise ConfigError(
            f"model.sequence_parallel splits dataset.seq_length={sequence} over TP x CP={shares}: make the length a "
            f"multiple of it"
        )
    chunks, stages = model.virtual_pipeline_model_parallel_size, model.pipeline_model_parallel_size
    if chunks is None:
        return
    if stages == 1:
        raise ConfigError("model.virtual_pipeline_model_parallel_size needs model.pipeline_model_parallel_size >= 2")
    samples = config.train.global_batch_size // layout.num_microbatches
    for size in batch_schedule(config).sizes():
        if size // samples % stages:
            raise ConfigError(
                f"the interleaved schedule needs micro-batches in multiples of PP={stages}, and a step of {size} "
                f"samples has {size // samples}: raise train.global_batch_size (or the numbers of "
                f"train.rampup_batch_size), or lower train.micro_batch_size"
            )
