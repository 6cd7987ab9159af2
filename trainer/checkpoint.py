"""What a checkpoint holds, and resuming from it, with Megatron-Core's `dist_checkpointing`.

A checkpoint is a folder `iter_0000003`: model and optimizer in Megatron's `torch_dist` format (which another layout
of ranks can read), `trainer.json` (step, data position, learning-rate schedule, what model this is) and each rank's
random states. `saving.py` writes them.

    load_checkpoint(state, find_latest(cfg.checkpoint.load))
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from safetensors.torch import load_file

from weightcast.sync.errors import ConfigError
from weightcast.trainer.optimizer_parts import fuse_adams, new_step, states_of_parts, torch_adams
from weightcast.trainer.peft.record import check_record, keep_trained, load_trained
from weightcast.trainer.state import TrainState, unwrap

logger = logging.getLogger(__name__)

# `non_homogeneous_layers` names every layer by its global number, so that another PP can read them;
# `fully_reshardable` keeps the optimizer's state in the parameters' own shapes, so that another TP and DP can; there is
# no prefix for each of the chained optimizers (one is for experts where EP is 2 or more), so that another EP can.
CONTENT = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
# What makes two models the same one, by the provider's names.
MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "share_embeddings_and_output_weights",
    "normalization",
    "add_qkv_bias",
    "qk_layernorm",
    "layernorm_zero_centered_gamma",
    "post_norms",
    "embedding_scale",
    "rotary_base",
    "rotary_base_local",
    "rope_scaling",
    "window_size",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "q_lora_rank",
    "kv_lora_rank",
)


@dataclass(frozen=True, slots=True)
class TrainerRecord:
    """`trainer.json`: what a resume needs besides tensors."""

    step: int
    consumed_samples: int
    world_size: int
    scheduler: dict[str, Any]
    model: dict[str, Any]


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Put the checkpoint `folder` into `state`. Every rank calls it; a collective.

    Raises `ConfigError` when the checkpoint is of another model, or cannot be read.
    """
    record = _read_record(folder)
    _check_same_model(record, state, folder)
    check_record(state.config, state.model, folder)
    loaded = dist_checkpointing.load(sharded_state(state, loading=True), str(folder))
    for index, chunk in enumerate(state.model):
        if state.config.peft.is_used:
            load_trained(unwrap(chunk), loaded[f"model{index}"])
        else:
            unwrap(chunk).load_state_dict(loaded[f"model{index}"])
    _load_optimizer(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(record.scheduler)
    state.step, state.consumed_samples = record.step, record.consumed_samples
    _restore_random_states(folder, record.world_size)


def sharded_state(state: TrainState, *, loading: bool) -> dict[str, Any]:
    """Model and optimizer as Megatron's sharded tensors; a collective."""
    _prepare_adam(state.optimizer)
    sharded = {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=dict(CONTENT))
        for index, chunk in enumerate(state.model)
    }
    if state.config.peft.is_used:
        sharded = {
            f"model{index}": keep_trained(unwrap(chunk), sharded[f"model{index}"])
            for index, chunk in enumerate(state.model)
        }
    # The optimizer looks its parameters up among the model's, whatever chunk they are in.
    return {**sharded, "optimizer": state.optimizer.sharded_state_dict(sharded, is_loading=loading, metadata=CONTENT)}


def _prepare_adam(optimizer: Any) -> None:
    """Give torch's Adam the state it makes in its first step, where there was none: before a load, or a save after
    steps that were all left out. Megatron reads each parameter's `step` there (0.16.1)."""
    for adam in torch_adams(optimizer):
        for parameter, its_group in [(item, group) for group in adam.param_groups for item in group["params"]]:
            if not adam.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": new_step(parameter, its_group), **zeros}


def _load_optimizer(optimizer: Any, loaded: Any) -> None:
    """Put the loaded state into Megatron's optimizer, whatever Adam it drives.

    Megatron (0.16.1) was made for Transformer Engine's Adam. Torch's keeps a `step` with every parameter, which
    `load_parameter_state_from_fully_reshardable` expects in the checkpoint and does not find; and Megatron gives all
    parameters one tensor as their step, which Adam then counts up in place once a parameter.
    """
    parts = optimizer.chained_optimizers
    states = states_of_parts(parts, loaded)
    if not torch_adams(optimizer):
        optimizer.load_state_dict(states[0] if len(states) == 1 else dict(enumerate(states)))
        return
    for part, part_state in zip(parts, states, strict=True):
        of_parameters = part_state.pop("param_state", None)
        part.load_state_dict(part_state)
        steps = {parameter: state.pop("step") for parameter, state in part.optimizer.state.items()}
        if of_parameters is not None:
            part.load_parameter_state_from_fully_reshardable(of_parameters)
        for parameter, step in steps.items():
            part.optimizer.state[parameter]["step"] = step.clone()
    fuse_adams(optimizer)


def describe(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "world_size": dist.get_world_size(),
        "scheduler": state.scheduler.state_dict(),
        "model": describe_model(state.provider),
    }


def describe_model(provider: Any) -> dict[str, Any]:
    """The fields that make two models the same one."""
    found = {name: getattr(provider, name) for name in MODEL_FIELDS if hasattr(provider, name)}
    described: dict[str, Any] = json.loads(json.dumps(found))  # as the record gives it back: tuples are lists
    return described


def _read_record(folder: Path) -> TrainerRecord:
    try:
        return TrainerRecord(**json.loads((folder / "trainer.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the checkpoint {folder} cannot be read: {error}; resume from an earlier one") from error


def _check_same_model(record: TrainerRecord, state: TrainState, folder: Path) -> None:
    present = describe_model(state.provider)
    faults = [
        f"{name} is {record.model.get(name)!r} there and {value!r} here"
        for name, value in present.items()
        if record.model.get(name) != value
    ]
    if faults:
        raise ConfigError(
            f"the checkpoint {folder} is of another model: {'; '.join(faults)}. Start from the model that was "
            f"trained there, or name another checkpoint.load"
        )


def random_states() -> dict[str, torch.Tensor]:
    states = {f"tracker.{name}": value for name, value in tensor_parallel.get_cuda_rng_tracker().get_states().items()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {"cpu": torch.get_rng_state(), **{name: value.clone() for name, value in states.items()}}


def _restore_random_states(folder: Path, saved_world_size: int) -> None:
    if saved_world_size != dist.get_world_size():
        logger.warning(
            "%s was saved by %d ranks and is resumed by %d: random states (dropout) start anew",
            folder,
            saved_world_size,
            dist.get_world_size(),
        )
        return
    states = load_file(folder / rng_file(dist.get_rank()))
    torch.set_rng_state(states.pop("cpu"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name.removeprefix("tracker."): value for name, value in states.items()}
    )


def rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"
