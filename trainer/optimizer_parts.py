"""The state of chained optimizers, from a checkpoint that had another number of them.

Megatron gives the experts an optimizer of their own where they are split over ranks (EP of 2 or more), and keeps them
with the other parameters otherwise. Tensors have global names either way; what is not a tensor, the parameter groups
with their rates and steps, is in the checkpoint by optimizer, and is put together anew here.

    states = states_of_parts(optimizer.chained_optimizers, loaded["optimizer"])

And torch's Adam inside of them, where there is neither Apex nor Transformer Engine: `fuse_adams(optimizer)`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from weightcast.sync.errors import ConfigError

_EXPERTS = "is_expert_parallel"


def torch_adams(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's; none where Apex or Transformer Engine give their own Adam."""
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [part for part in inner if isinstance(part, torch.optim.Adam | torch.optim.AdamW)]


def fuse_adams(optimizer: Any) -> None:
    """Let torch's Adam update all parameters in one kernel where they are on a GPU, and as it does by itself elsewhere.

    By itself it goes over them about fifteen times, with temporary copies. After a load it is called again: the groups
    of parameters are then those of the checkpoint, which may come from a machine of the other kind.
    """
    for adam in torch_adams(optimizer):
        for group in adam.param_groups:
            is_fused = bool(group["params"]) and all(parameter.is_cuda for parameter in group["params"])
            set_fused(adam, group, True if is_fused else None)


def set_fused(adam: torch.optim.Optimizer, group: dict[str, Any], is_fused: bool | None) -> None:
    """Set `fused` of a group, with the counts of its steps where the kernel wants them: beside the parameters."""
    group["fused"] = is_fused
    for parameter in group["params"]:
        state = adam.state.get(parameter, {})
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(device=parameter.device if is_fused else "cpu", dtype=torch.float32)


def new_step(parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """The count of steps that Adam starts with, where its kernel wants it."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")


def states_of_parts(parts: Sequence[Any], loaded: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """One state for each of `parts`, the optimizers of this rank, from what the checkpoint gave for all.

    `loaded` has its keys directly where there was one optimizer, and by number where there were several; where the
    numbers differ, it is a mixture of both. Raises `ConfigError` where they differ without the distributed optimizer.
    """
    numbers = sorted(key for key in loaded if isinstance(key, int))
    saved = [loaded[number] for number in numbers if "optimizer" in loaded[number]] or [loaded]
    own = [loaded] if len(parts) == 1 else [loaded.get(number, {}) for number in range(len(parts))]
    if len(saved) == len(parts):
        return [dict(state) for state in own]
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        raise ConfigError(
            f"the checkpoint has {len(saved)} optimizer(s) and this layout {len(parts)}, which only the distributed "
            f"optimizer can put together: resume with the model.expert_model_parallel_size of the checkpoint"
        )
    groups = [group for state in saved for group in state["optimizer"]["param_groups"]]
    common = {key: value for key, value in saved[0].items() if not isinstance(key, int) and key != "param_state"}
    return [
        common
        | {key: value for key, value in state.items() if not isinstance(key, int) and key != "optimizer"}
        | {"optimizer": common["optimizer"] | {"param_groups": _matching(part.optimizer.param_groups, groups)}}
        for part, state in zip(parts, own, strict=True)
    ]


def _matching(present: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The saved group of each present one: of the same kind, or of the same kind but for being experts'."""
    kinds = [name for name in param_group_identifier_keys if name != _EXPERTS]
    found = []
    for group in present:
        # In Megatron 0.19 the kinds include overrides, which a group has only where it was given them.
        alike = [saved for saved in groups if all(saved.get(name) == group.get(name) for name in kinds)]
        same = [saved for saved in alike if saved[_EXPERTS] == group[_EXPERTS]]
        assert alike, "a group of parameters that no optimizer of the same model has"
        found.append({**(same or alike)[0], _EXPERTS: group[_EXPERTS]})
    return found
