"""Six steps at once are three, another process, and three more: losses and weights to the last bit."""

from pathlib import Path
from typing import Any

import pytest
from tests.ranks import run_ranks
from tests.trainer.runs import train_all, words_for

LAYOUTS = {
    "TP2": ["model.tensor_model_parallel_size=2"],
    "DP2": ["train.micro_batch_size=2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module save and export."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def shared_words(gemma3_bf16: Path, texts: list[Path], folder: Path) -> list[str]:
    """What all runs have in common: bf16 with fp32 masters and the distributed optimizer."""
    return words_for(gemma3_bf16, texts, folder / "cache")


@pytest.fixture(scope="module")
def before(shared_words: list[str], folder: Path) -> dict[str, Any]:
    """In one set of processes: six steps, and three with a checkpoint each step, for each layout."""
    runs = {}
    for name, words in LAYOUTS.items():
        export = f"checkpoint.export_hf={folder / name}-six"
        runs[f"{name} six"] = [*shared_words, *words, "train.train_iters=6", export]
        runs[f"{name} three"] = [*shared_words, *words, "train.train_iters=3", f"checkpoint.save={folder / name}"]
    runs["TP2 three"].append("checkpoint.save_interval=1")
    return _run(runs)


@pytest.fixture(scope="module")
def after(before: dict[str, Any], shared_words: list[str], qwen3: Path, folder: Path) -> dict[str, Any]:
    """In fresh processes: the three steps that follow, and what must not be resumed."""
    # What an interrupted save leaves behind.
    (folder / "TP2" / ".saving-iter_0000004").mkdir()
    (folder / "TP2" / ".saving-iter_0000004" / "__0_0.distcp").write_bytes(b"half")
    runs = {}
    for name, words in LAYOUTS.items():
        export = f"checkpoint.export_hf={folder / name}-resumed"
        runs[name] = [*shared_words, *words, "train.train_iters=6", f"checkpoint.load={folder / name}", export]
    runs["TP2"].append(f"checkpoint.save={folder / 'TP2'}")
    runs["PP2 from TP2"] = [
        *shared_words,
        "train.train_iters=6",
        "model.pipeline_model_parallel_size=2",
        f"checkpoint.load={folder / 'DP2'}",
    ]
    runs["another model"] = [*shared_words, f"model.hf_path={qwen3}", f"checkpoint.load={folder / 'DP2'}"]
    runs["no checkpoint"] = [*shared_words, f"checkpoint.load={folder / 'none'}"]
    return _run(runs)


def _run(runs: dict[str, list[str]]) -> dict[str, Any]:
    first, second = run_ranks(train_all, 2, runs, timeout_s=240)
    assert first == second
    results: dict[str, Any] = first
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact(layout: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    whole, resumed = before[f"{layout} six"], after[layout]
    assert "error" not in resumed, resumed
    assert before[f"{layout} three"]["losses"] == whole["losses"][:3]
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["grad_norms"] == whole["grad_norms"][3:]
    assert resumed["lrs"] == whole["lrs"][3:]
    assert resumed["weights"] == whole["weights"]


def test_another_layout_goes_on_with_the_same_curve(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after["PP2 from TP2"]["losses"] == pytest.approx(before["DP2 six"]["losses"][3:], abs=2e-2)


def test_newest_checkpoints_are_kept_and_remains_are_cleared(after: dict[str, Any], folder: Path) -> None:
    assert after
    assert sorted(path.name for path in (folder / "TP2").iterdir()) == [
        "iter_0000003",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
        "run_config.yaml",
    ]
    assert (folder / "TP2" / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_a_checkpoint_of_another_model_is_refused(after: dict[str, Any]) -> None:
    error = after["another model"]["error"]
    assert error.startswith("ConfigError")
    assert "is of another model" in error
    assert "post_norms is True there and False here" in error


def test_a_folder_without_checkpoint_is_refused(after: dict[str, Any]) -> None:
    assert "holds no checkpoint" in after["no checkpoint"]["error"]
