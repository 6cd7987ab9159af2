"""vLLM's own model classes with their own loaders, built in a test's process: no engine, no kernels, no server.

Imported where vLLM is there, by functions that run in processes of their own (`tests.ranks`): vLLM keeps its process
groups and its configuration in globals.
"""

import os
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from weightcast.adapters.vllm.twin import without_layers


def make_config(folder: Path, **arguments: Any) -> VllmConfig:
    """The configuration of a worker of as many tensor-parallel ranks as there are."""
    return EngineArgs(
        model=str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
        **arguments,
    ).create_engine_config()


def join_groups(config: VllmConfig) -> None:
    """Make vLLM's process groups, of all ranks. Once a process."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with set_current_vllm_config(config):
        init_distributed_environment(world_size, rank, "env://", rank, "gloo")
        initialize_model_parallel(world_size)


def build(config: VllmConfig) -> torch.nn.Module:
    """The model on the CPU, as a worker has it before it loads."""
    config = without_layers(config)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        model: torch.nn.Module = initialize_model(config, model_config=config.model_config)
    return model


def load(model: torch.nn.Module, config: VllmConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's parameters after its loader was given `tensors`, before they are processed."""
    with set_current_vllm_config(config):
        model.load_weights(iter(tensors.items()))  # type: ignore[operator]
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
