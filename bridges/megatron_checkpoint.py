"""Megatron's own checkpoints (`torch_dist`) of a model's weights, through `megatron.core.dist_checkpointing`.

Every rank writes and reads its own shards, under the same global keys that plans use, so a checkpoint of one layout
loads into any other. The program that saves needs `if __name__ == "__main__":`, because Megatron starts a helper
process that imports it again.

    save_checkpoint(model, Path("checkpoints/qwen3"))
    load_checkpoint(model_of_another_layout, Path("checkpoints/qwen3"))
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from weightcast.bridges.exchange import agreement, get_rank
from weightcast.bridges.shards import EXTRA_STATE_SUFFIX, SHARDING_METADATA, Model, unwrap_chunks
from weightcast.sync.errors import CheckpointMismatch, ConfigError


def save_checkpoint(model: Model, folder: Path) -> None:
    """Write the weights of `model`, its list of chunks, to a new or empty `folder`. Every rank must call it.

    Raises `ConfigError` on every rank when the folder holds something.
    """
    with agreement(f"making room for {folder}"):
        if get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(f"{folder} is not empty; give a new folder for each Megatron checkpoint")
    dist_checkpointing.save(_sharded_state(model), str(folder), content_metadata=dict(SHARDING_METADATA))


def load_checkpoint(model: Model, folder: Path) -> None:
    """Fill the weights of `model`, of any layout, from a checkpoint. Every rank must call it.

    Raises `CheckpointMismatch` when the checkpoint is none, or of another model.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise CheckpointMismatch(f"{folder} is no Megatron checkpoint; give a folder that save_megatron_model wrote")
    wanted = _sharded_state(model)
    apply_factories(wanted)
    tensors = [entry for entry in nested_values(wanted) if isinstance(entry, ShardedTensor)]
    _check_tensors(tensors, dist_checkpointing.load_tensors_metadata(str(folder)), folder)
    state = dist_checkpointing.load(_sharded_state(model), str(folder))
    for index, chunk in enumerate(unwrap_chunks(model)):
        # Strict would also ask for Transformer Engine's extra state, which is no weight.
        problems = chunk.load_state_dict(state[_chunk_key(index)], strict=False)
        missing = [name for name in problems.missing_keys if not name.endswith(EXTRA_STATE_SUFFIX)]
        assert not missing and not problems.unexpected_keys, problems


def _check_tensors(wanted: Sequence[Any], found: Mapping[str, Any], folder: Path) -> None:
    """Compare this rank's part of the model with the checkpoint's tensors before any is read.

    Megatron compares shapes too, but raises a `BaseException` from inside torch's planner.
    """
    for entry in wanted:
        shape = tuple(entry.global_shape)
        got = tuple(found[entry.key].global_shape) if entry.key in found else None
        # The padded vocabulary may differ between layouts; Megatron cuts or keeps rows.
        fits = got is not None and (got[1:] == shape[1:] if entry.allow_shape_mismatch else got == shape)
        if not fits:
            raise CheckpointMismatch(
                f"{entry.key} has shape {shape} in the model and {got or 'does not exist'} in {folder}; "
                "load the checkpoint with the bridge of its own model"
            )
    keys = {entry.key for entry in wanted}
    layers = {_layer_of(key) for key in keys} - {""}
    for key in found:
        if key not in keys and _layer_of(key) in layers:
            raise CheckpointMismatch(
                f"{key} in {folder} is no tensor of the model; load the checkpoint with the bridge of its own model"
            )


def _layer_of(key: str) -> str:
    match = re.match(r"(?:language_model\.)?decoder\.layers\.\d+\.", key)
    return match[0] if match else ""


def _sharded_state(model: Model) -> dict[str, Any]:
    """The chunks' sharded tensors. Extra state stays out: it is pickled, and weights never live in it."""
    return {
        _chunk_key(index): {
            key: entry
            for key, entry in chunk.sharded_state_dict(metadata=dict(SHARDING_METADATA)).items()
            if not isinstance(entry, ShardedObject)
        }
        for index, chunk in enumerate(unwrap_chunks(model))
    }


def _chunk_key(index: int) -> str:
    return f"model{index}"
