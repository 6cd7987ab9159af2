"""Whether ranks, model and global batch can be divided as asked.

layout = check_layout(config, world_size=4)
"""

from dataclasses import dataclass
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_positive
from weightcast.trainer.config import ConfigContainer


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks and a global batch are divided."""

    world_size: int
    data_parallel_size: int
    num_microbatches: int
    """Micro-batches that each data-parallel rank runs in one optimizer step."""


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
        }
    )
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
    samples = config.train.micro_batch_size * replicas
    if config.train.global_batch_size % samples:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} cannot be divided into micro-batches of "
            f"{config.train.micro_batch_size} on {replicas} data-parallel rank(s): make it a multiple of {samples}"
        )
    return Layout(world_size, replicas, config.train.global_batch_size // samples)


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
    if layout.num_microbatches % stages:
        raise ConfigError(
            f"the interleaved schedule needs micro-batches in multiples of PP={stages}, and a step has "
            f"{layout.num_microbatches}: raise train.global_batch_size or lower train.micro_batch_size"
        )
