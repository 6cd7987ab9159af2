"""Megatron's own checkpoints (`torch_dist`) of a model's weights, through `megatron.core.dist_checkpointing`.

Every rank writes and reads its own shards, under the same global keys that plans use, so a checkpoint of one layout
loads into any other. Like HF folders, a checkpoint is written beside its folder and takes the name when all ranks are
done. The program that saves needs `if __name__ == "__main__":`, because Megatron starts a helper process that imports
it again.

    save_checkpoint(model, Path("checkpoints/qwen3"))
    load_checkpoint(model_of_another_layout, Path("checkpoints/qwen3"))
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from weightcast.bridges.exchange import agree
from weightcast.bridges.shards import EXTRA_STATE_SUFFIX, SHARDING_METADATA, Model, unwrap_chunks
from weightcast.bridges.whole_folder import (
    check_new,
    explain_disk,
    on_rank_zero,
    partial_of,
    refusal,
    start_empty,
    take_new_name,
)
from weightcast.sync.errors import CheckpointMismatch, StorageError

# Well above Megatron's first file, common.pt, which without an optimizer has 1.3 KB (megatron-core 0.16).
_SMALL_FILES_BYTES = 64 * 1024


def save_checkpoint(model: Model, folder: Path) -> None:
    """Write the weights of `model`, its list of chunks, to a new or empty `folder`. Every rank must call it.

    The folder appears only when it is complete. Raises `ConfigError` when it holds something (a `BridgeError` on the
    ranks that did not look), and `StorageError` on every rank when the disk refuses a write.
    """
    partial = partial_of(folder)
    with explain_disk(folder):
        on_rank_zero(lambda: _make_room(folder, partial), f"making room for {folder}")
        try:
            dist_checkpointing.save(
                _sharded_state(model),
                str(partial),
                sharded_strategy=AgreedSave("torch_dist", 1),
                content_metadata=dict(SHARDING_METADATA),
            )
        except CheckpointException as error:
            if error.args[0] != "write":
                raise
            raise StorageError(refusal(folder, _say_who(error))) from error
        # An empty folder of the name is replaced, and one that got something meanwhile is not.
        on_rank_zero(lambda: take_new_name(partial, folder), f"finishing {folder}")


class AgreedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's way to save, after which all ranks know whether rank 0 could write its small files.

    Rank 0 alone writes `.metadata` and `metadata.json` between two collectives; where that raises, Megatron leaves the
    other ranks waiting in the second one. Here the first error is kept until all ranks have left Megatron's collectives
    and can agree, and `metadata.json` is written before Megatron writes the same again into the room it has.
    """

    error: Exception | None = None

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        """As Megatron's. Every rank must call it; it fails on every rank when it fails on any."""
        super().save(sharded_state_dict, checkpoint_dir)
        agree(self.error, f"writing .metadata to {checkpoint_dir}")
        config = CheckpointingConfig(self.backend, self.version)
        on_rank_zero(lambda: save_config(config, checkpoint_dir), f"writing metadata.json to {checkpoint_dir}")

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        finish = writer.finish

        def finish_or_keep_error(*args: Any) -> None:
            try:
                finish(*args)
            except Exception as error:
                self.error = error

        writer.finish = finish_or_keep_error
        return super()._get_save_and_finalize_callbacks(writer, *args)


def _make_room(folder: Path, partial: Path) -> None:
    check_new(folder)
    start_empty(partial)
    # Megatron writes its first file on rank 0 alone while the others go on; a disk that is full already must show here,
    # where all ranks agree.
    probe = partial / "probe"
    with probe.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _SMALL_FILES_BYTES)
    probe.unlink()


def _say_who(error: CheckpointException) -> str:
    """The failed ranks; Megatron tells rank 0 alone."""
    return (
        "; ".join(f"rank {rank}: {why[0]}" for rank, why in error.failures.items()) or "rank 0 says which rank failed"
    )


def load_checkpoint(model: Model, folder: Path) -> None:
    """Fill the weights of `model`, of any layout, from a checkpoint. Every rank must call it.

    Raises `CheckpointMismatch` when the checkpoint is none, is damaged, or is of another model.
    """
    require_checkpoint(folder)
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


def require_checkpoint(folder: Path) -> None:
    """Raise `CheckpointMismatch` unless `folder` says that it is a whole checkpoint of Megatron's."""
    try:
        found = dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    except (ValueError, TypeError) as error:  # no JSON, or not the fields of Megatron's record
        damaged = folder / "metadata.json"
        raise CheckpointMismatch(f"{damaged} is damaged ({error}); save the checkpoint again") from error
    if not found:
        raise CheckpointMismatch(f"{folder} is no Megatron checkpoint; give a folder that save_megatron_model wrote")


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
