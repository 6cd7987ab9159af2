"""Whether ranks, model and global batch can be divided as asked.

layout = check_layout(config, world_size=4)
"""

from dataclasses import dataclass

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
    check_positive(
        {
            "model.tensor_model_parallel_size": config.model.tensor_model_parallel_size,
            "model.pipeline_model_parallel_size": config.model.pipeline_model_parallel_size,
            "train.micro_batch_size": config.train.micro_batch_size,
            "train.global_batch_size": config.train.global_batch_size,
            "train.train_iters": config.train.train_iters,
        }
    )
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


def check_model(config: ConfigContainer, layout: Layout) -> None:
    """Sequence, stages and micro-batches fit the layout."""
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
