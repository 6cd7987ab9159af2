"""Checkpoints of other trainers: their folders, their spelling of layers and experts, and what else they hold.

Each is written by megatron-core's own `dist_checkpointing.save`, by two ranks, as Megatron-LM and Megatron-Bridge call
it: layers that are all alike lie under one key with an axis of layers in front.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.bridges.test_standalone import equal, to_hf
from tests.ranks import run_ranks

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.inspect_path import inspect_path
from weightcast.bridges.standalone_checkpoint import DistCheckpoint, find_checkpoint
from weightcast.bridges.standalone_export import export_checkpoint
from weightcast.sync.errors import CheckpointMismatch

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

SIZES = {
    "llama3.2": {"tensor_model_parallel_size": 2},
    "qwen3": {"pipeline_model_parallel_size": 2},
    "mixtral": {"expert_model_parallel_size": 2, "moe_layer_freq": 1},
}


def save_as_a_trainer(source: str, folder: str, sizes: dict[str, Any], prefix: str) -> None:
    """Weights with extra state, an optimizer's and random states, and the program's arguments."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider()
    for name, size in sizes.items():
        setattr(provider, name, size)
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
    weights = chunk.sharded_state_dict()
    add_prefix_for_sharding(weights, prefix)
    rank = dist.get_rank()

    def tensor(key: str) -> Any:
        return ShardedTensor.from_rank_offsets(key, torch.zeros(3), replica_id=rank)

    def thing(key: str) -> Any:
        return ShardedObject(key, {"rank": rank}, (2,), (rank,))

    state = {
        "model": weights,
        "optimizer": [tensor("optimizer.state.exp_avg.output_layer.weight"), tensor("chained_1.optimizer.param")],
        "rng_state": thing("rng_state"),
        "extra": thing("decoder.layers.self_attention.core_attention._extra_state"),
        "args": argparse.Namespace(hidden_size=32),
        "iteration": 7,
    }
    if rank == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, folder)


@pytest.mark.parametrize(("name", "prefix"), [("llama3.2", ""), ("qwen3", "module."), ("mixtral", "model.")])
def test_what_megatron_lm_writes_is_read(name: str, prefix: str, tiny_models: Path, tmp_path: Path) -> None:
    source, run = tiny_models / name, tmp_path / "run"
    run_ranks(save_as_a_trainer, 2, str(source), str(run / "iter_0000007"), SIZES[name], prefix)
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    checkpoint = DistCheckpoint.open(run)
    assert checkpoint.specs["decoder.layers.self_attention.linear_qkv.weight"].shape[0] == 4
    if name == "mixtral":
        assert checkpoint.specs["decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape[:2] == (4, 4)
    left_out = checkpoint.kinds_of_others()
    assert left_out["optimizer"] == 1 and left_out["chained_1"] == 1
    assert left_out["rng_state"] == 2 and left_out["_extra_state"] >= 2
    assert equal(source, run)
    report = export_checkpoint(
        AutoBridge.from_hf_pretrained(source), run, tmp_path / "back", show_progress=False, shard_bytes=40_000
    )
    assert equal(source, tmp_path / "back") and report.left_out == left_out
    contents = inspect_path(run)
    assert contents.order.startswith("an axis of layers") and "rng_state/shard_0_2" in contents.others


def test_what_megatron_bridge_writes_is_read(tiny_models: Path, tmp_path: Path) -> None:
    source, run = tiny_models / "llama3.2", tmp_path / "run"
    run_ranks(save_as_a_trainer, 2, str(source), str(run / "iter_0000000"), SIZES["llama3.2"], "")
    # Its tracker is a pickle, which is not read: the last checkpoint that was written to its end is taken.
    (run / "latest_train_state.pt").write_bytes(b"a pickle")
    (run / "iter_0000000" / "run_config.yaml").write_text("model:\n  hf_model_id: some/model\n")
    (run / "iter_0000000" / "train_state.pt").write_bytes(b"a pickle")
    shutil.copytree(run / "iter_0000000", run / "iter_0000010")
    (run / "iter_0000010" / ".metadata").unlink()
    assert find_checkpoint(run) == run / "iter_0000000"
    assert find_checkpoint(run / "iter_0000000") == run / "iter_0000000"
    assert equal(source, run)
    assert equal(source, to_hf(source, run, tmp_path / "back"))


def test_a_tracker_that_names_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(CheckpointMismatch, match=r"says '12', and there is no .*iter_0000012; .* holds none"):
        DistCheckpoint.open(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "release"
