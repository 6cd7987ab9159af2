"""Checkpoints of a mixture of experts: written beside training, exact after a kill, whole on a full disk."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.bridges.tiny_models import write_tiny_model
from tests.ranks import run_ranks
from tests.trainer.runs import words_for
from tests.trainer.watched import train_watched

EP2, MICRO2 = "model.expert_model_parallel_size=2", "train.micro_batch_size=2"
LAYOUTS = {
    "PP2": ["model.pipeline_model_parallel_size=2", MICRO2],
    "TP2 ETP2": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "DP2": [MICRO2],
    "CP2": ["model.context_parallel_size=2", EP2, MICRO2],
}
LATEST = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs save and export."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def shared(texts: list[Path], folder: Path) -> list[str]:
    """What all runs have in common: ten steps of a Qwen3-MoE in fp32, without the loss that depends on the layout."""
    model = write_tiny_model("qwen3-moe", folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"router_aux_loss_coef": 0.0}))
    words = words_for(model, texts, folder / "cache")
    return [*words, "scheduler.lr_decay_iters=12", "train.train_iters=10"]


@pytest.fixture(scope="module")
def before(shared: list[str], folder: Path) -> dict[str, Any]:
    """Ten steps at once; then, in other processes, a run that is killed after its first checkpoint, at step 5."""
    whole = [*shared, EP2, MICRO2, f"checkpoint.save={folder / 'whole'}", "checkpoint.save_interval=3"]
    killed = [
        *shared,
        EP2,
        MICRO2,
        f"checkpoint.save={folder / 'killed'}",
        "checkpoint.save_interval=5",
        "train.train_iters=40",
    ]
    (result, other) = run_ranks(
        train_watched, 2, {"whole": {"words": [*whole, f"checkpoint.export_hf={folder / 'whole-hf'}"]}}
    )
    assert result["whole"]["loss"] == other["whole"]["loss"]
    with pytest.raises(AssertionError, match="rank"):
        run_ranks(train_watched, 2, {"killed": {"words": killed, "trouble": "death", "at": 5}})
    found: dict[str, Any] = result["whole"]
    return found


@pytest.fixture(scope="module")
def after(before: dict[str, Any], shared: list[str], folder: Path) -> dict[str, Any]:
    """What goes on from the checkpoint of step 5, and what must not."""
    load = f"checkpoint.load={folder / 'killed'}"
    resumed = [*shared, EP2, MICRO2, load, f"checkpoint.export_hf={folder / 'resumed-hf'}"]
    newest = f"{folder / 'whole'}"
    disk = [*shared, EP2, MICRO2, f"checkpoint.save={folder / 'disk'}", "checkpoint.save_interval=2"]
    again = [*shared, EP2, MICRO2, f"checkpoint.save={folder / 'disk'}", f"checkpoint.load={folder / 'disk'}"]
    beside = [*again, "checkpoint.save_interval=1", "checkpoint.async_save=true"]
    fresh = [*shared, EP2, MICRO2, "model.load_weights=false", "train.train_iters=2"]
    runs: dict[str, dict[str, Any]] = {
        "resumed": {"words": resumed},
        **{name: {"words": [*shared, *words, load]} for name, words in LAYOUTS.items()},
        "full on rank 0": {"words": disk, "trouble": "full disk", "at": 4, "rank": 0},
        "full on rank 1": {"words": beside, "trouble": "full disk", "at": 4, "rank": 1},
        "room again": {"words": again},
        "pretrained": {"words": [*fresh, f"checkpoint.pretrained_checkpoint={newest}"]},
        "finetune": {"words": [*fresh, f"checkpoint.load={newest}", "checkpoint.finetune=true"]},
        "step 9": {"words": [*shared, EP2, MICRO2, f"checkpoint.load={newest}", "checkpoint.ckpt_step=9"]},
        "step 7": {"words": [*shared, EP2, MICRO2, f"checkpoint.load={newest}", "checkpoint.ckpt_step=7"]},
    }
    first, second = run_ranks(train_watched, 2, runs, timeout_s=240)
    both: dict[str, Any] = first | {f"{name}, seen by rank 1": result for name, result in second.items()}
    return both


def test_training_goes_on_while_checkpoints_are_written(before: dict[str, Any], folder: Path) -> None:
    assert before["saved"] == ["iter_0000003", "iter_0000006", "iter_0000009", "iter_0000010"]
    kept = sorted(path.name for path in (folder / "whole").iterdir())
    assert kept == ["iter_0000009", "iter_0000010", LATEST, "run_config.yaml"]
    assert (folder / "whole" / LATEST).read_text() == "10"


def test_five_steps_a_kill_and_five_more_are_ten_to_the_last_bit(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = after["resumed"]
    assert "error" not in found, found
    for name in ("loss", "grad_norm", "lr"):
        assert found[name] == before[name][5:], name
    assert found["weights"] == before["weights"] is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on_with_the_same_curve(layout: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    assert "error" not in after[layout], after[layout]
    assert after[layout]["loss"] == pytest.approx(before["loss"][5:], abs=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_one_clear_error_and_costs_no_earlier_checkpoint(
    rank: int, after: dict[str, Any], before: dict[str, Any]
) -> None:
    for found in (after[f"full on rank {rank}"], after[f"full on rank {rank}, seen by rank 1"]):
        assert found["error"].startswith("StorageError"), found
        assert "make room on the disk" in found["error"]
    # Megatron-Core 0.19 logs a writer's words and passes on no more than the kind of its error.
    assert re.search("File too large|<class 'OSError'>", after[f"full on rank {rank}"]["error"])
    assert after["full on rank 1"]["told"][0] == "start 2"  # what the first run had saved
    assert after["room again"]["told"][0] == "start 3"
    assert after["room again"]["loss"] == before["loss"][3:]


def test_nothing_half_written_is_left(after: dict[str, Any], folder: Path) -> None:
    assert sorted(path.name for path in (folder / "disk").iterdir()) == [
        "iter_0000003",
        "iter_0000010",
        LATEST,
        "run_config.yaml",
    ]


def test_weights_alone_begin_a_run_anew(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("pretrained", "finetune"):
        assert after[name]["told"][0] == "start 0"
        assert after[name]["loss"][0] < before["loss"][0] - 0.1
    assert after["pretrained"]["loss"] == after["finetune"]["loss"]


def test_a_step_can_be_chosen(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after["step 9"]["loss"] == before["loss"][9:]
    assert "there is no" in after["step 7"]["error"] and "iter_0000009, iter_0000010" in after["step 7"]["error"]
