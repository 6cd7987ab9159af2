"""Sets up torch.distributed and Megatron's process groups, alike under torchrun and in a lone process.

Under torchrun the group is read from its environment variables, with nccl on GPUs and gloo elsewhere; a process that
torchrun did not start gets a group of one, so that a script or a notebook runs as it stands. All of it may be called
again: what is already set up is checked, not rebuilt.

    initialize_distributed()
    initialize_model_parallel(provider, seed=1234)
"""

import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from weightcast.bridges.layers.rope import forget_tables
from weightcast.bridges.runtime import ensure_runtime, has_cuda
from weightcast.sync.errors import ConfigError

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_TIMEOUT_S = 600.0


def _under_torchrun() -> bool:
    """True with all of torchrun's variables, False with none; a part of them is a mistake worth naming."""
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if "RANK" in missing and "MASTER_ADDR" in missing:
        return False
    if missing:
        raise ConfigError(
            f"torch.distributed: the environment has some of {', '.join(_TORCHRUN_VARIABLES)} but lacks "
            f"{', '.join(missing)}; start the program with torchrun, or unset them for a single process"
        )
    return True


def runs_alone() -> bool:
    """True in a process that has no process group and was not started by torchrun. Raises ConfigError as below."""
    return not dist.is_initialized() and not _under_torchrun()


def initialize_distributed(backend: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Create the default process group if there is none. Every rank calls it; it is a collective.

    `backend` is nccl where CUDA is available and gloo elsewhere unless given. Under torchrun rank and size come from
    the environment, and the rank's CUDA device is LOCAL_RANK; otherwise this process becomes a group of one, which
    opens no port. Raises ConfigError when torchrun's variables are incomplete.
    """
    ensure_runtime()
    if dist.is_initialized():
        return
    backend = backend if backend is not None else ("nccl" if has_cuda() else "gloo")
    timeout = timedelta(seconds=timeout_s)
    if _under_torchrun():
        if has_cuda():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def model_parallel_sizes(config: ModelParallelConfig) -> dict[str, int]:
    """The sizes that decide the process groups, by the names of `initialize_model_parallel`'s arguments."""
    return {
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "context_parallel_size": config.context_parallel_size,
        "expert_model_parallel_size": config.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.expert_tensor_parallel_size or config.tensor_model_parallel_size,
    }


def _present_sizes() -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _check_world(sizes: dict[str, int]) -> None:
    """Raise ConfigError unless the ranks at hand divide into the groups asked for."""
    world = dist.get_world_size()
    dense = sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"] * sizes["context_parallel_size"]
    expert = (
        sizes["expert_tensor_parallel_size"]
        * sizes["expert_model_parallel_size"]
        * sizes["pipeline_model_parallel_size"]
    )
    for what, ranks in (("tensor x pipeline x context", dense), ("expert tensor x expert x pipeline", expert)):
        if world % ranks != 0:
            asked = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
            raise ConfigError(
                f"model parallel sizes: {what} = {ranks} does not divide the {world} running process(es) ({asked}); "
                f"start a multiple of {ranks} with torchrun --nproc-per-node, or lower the sizes"
            )


def initialize_model_parallel(config: ModelParallelConfig, seed: int = 1234) -> None:
    """Create Megatron's process groups for the sizes in `config`, and its random states from `seed`.

    Every rank calls it, after `initialize_distributed`; it is a collective. Groups that exist with the same sizes are
    kept. Raises ConfigError when they exist with other sizes, or when the sizes do not divide the world.
    """
    ensure_runtime()
    sizes = model_parallel_sizes(config)
    if parallel_state.model_parallel_is_initialized():
        different = {name: size for name, size in _present_sizes().items() if size != sizes[name]}
        if different:
            wanted = ", ".join(f"{name}={sizes[name]} (now {size})" for name, size in different.items())
            raise ConfigError(
                f"Megatron's process groups exist with other sizes: {wanted}; use the sizes at hand, or call "
                "weightcast.bridges.process_groups.destroy_model_parallel() on every rank first"
            )
        parallel_state.set_virtual_pipeline_model_parallel_world_size(config.virtual_pipeline_model_parallel_size)
        return
    _check_world(sizes)
    parallel_state.initialize_model_parallel(
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        # A fake group, as plans for ranks that do not exist use, cannot have gloo groups beside it.
        create_gloo_process_groups=dist.get_backend() != "fake",
        **sizes,
    )
    # Another seed for each pipeline stage, as Megatron-LM does, so that their layers do not start alike.
    model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())


def destroy_model_parallel() -> None:
    """Close Megatron's process groups, so that other sizes can be set up. Every rank calls it.

    Models that were built with them can be read from then on, and no longer talk to other ranks.
    """
    # Megatron only forgets them. gloo keeps a thread for each that wakes a hundred times a second, NCCL memory.
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    forget_tables()
    for group in groups:
        with suppress(ValueError):  # one of those few that Megatron has closed
            dist.destroy_process_group(group)


def destroy_distributed() -> None:
    """Forget Megatron's groups and close the default process group. Every rank calls it, at the end."""
    destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
