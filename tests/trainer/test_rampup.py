"""A batch that ramps up, over a length in samples: the same in every layout, and to the last bit after a resume."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import run_ranks
from tests.trainer.runs import words_for
from tests.trainer.test_batch_schedule import RAMP, SAMPLES, SIZES
from tests.trainer.watched import train_watched

TP2 = "model.tensor_model_parallel_size=2"
LEFT_AFTER = 5  # in the middle of the ramp-up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs save and export."""
    return tmp_path_factory.mktemp("rampup")


@pytest.fixture(scope="module")
def shared(qwen3: Path, texts: list[Path], folder: Path) -> list[str]:
    """What all runs have in common."""
    words = words_for(qwen3, texts, folder / "cache")
    more = ["scheduler.lr_decay_iters=null", "dataset.split=80,20,0", "train.eval_interval=4", "train.eval_iters=2"]
    return [*words, *RAMP, *SAMPLES, *more]


@pytest.fixture(scope="module")
def before(shared: list[str], folder: Path) -> dict[str, Any]:
    """Whole runs, and one that leaves early."""
    leaving = [f"train.exit_interval={LEFT_AFTER}", f"checkpoint.save={folder / 'saved'}"]
    return _run(
        {
            "whole": [*shared, f"checkpoint.export_hf={folder / 'whole'}"],
            "TP2": [*shared, TP2],
            "by steps": [*shared, "train.train_samples=null", "train.train_iters=9", "scheduler.lr_decay_samples=40"],
            "interrupted": [*shared, *leaving],
        }
    )


@pytest.fixture(scope="module")
def after(before: dict[str, Any], shared: list[str], folder: Path) -> dict[str, Any]:
    """In fresh processes: what follows the one that left."""
    assert "error" not in before["interrupted"], before["interrupted"]
    load = f"checkpoint.load={folder / 'saved'}"
    return _run(
        {
            "resumed": [*shared, load, f"checkpoint.export_hf={folder / 'resumed'}"],
            "resumed as TP2": [*shared, load, TP2],
        }
    )


def _run(runs: dict[str, list[str]]) -> dict[str, Any]:
    first, second = run_ranks(train_watched, 2, {name: {"words": words} for name, words in runs.items()}, timeout_s=240)
    for name in first:
        assert first[name]["loss"] == second[name]["loss"]
    results: dict[str, Any] = first
    return results


def test_steps_grow_and_the_schedule_follows_the_samples(before: dict[str, Any]) -> None:
    found = before["whole"]
    assert "error" not in found, found
    assert found["global_batch_size"] == SIZES
    assert found["consumed_samples"] == [sum(SIZES[: step + 1]) for step in range(len(SIZES))]
    assert found["num_tokens"][4] > 1.5 * found["num_tokens"][0]
    low, high = 2e-4, 2e-3
    starts = [0, *found["consumed_samples"][:-1]]
    assert found["lr"] == pytest.approx([low + (high - low) * (1 + math.cos(math.pi * at / 40)) / 2 for at in starts])
    assert (found["stop"], found["is_complete"]) == ("all 9 steps are done", True)
    assert found["loss"][-1] < found["loss"][0] - 0.05


def test_a_length_in_steps_is_the_same_run(before: dict[str, Any]) -> None:
    for name in ("loss", "lr", "grad_norm", "consumed_samples", "evaluations"):
        assert before["by steps"][name] == before["whole"][name]


def test_every_layout_has_the_same_steps(before: dict[str, Any]) -> None:
    assert before["TP2"]["loss"] == pytest.approx(before["whole"]["loss"], abs=1e-5)
    assert before["TP2"]["global_batch_size"] == SIZES
    assert before["TP2"]["evaluations"] == pytest.approx(before["whole"]["evaluations"], abs=1e-5)


def test_a_resume_in_the_middle_is_exact(before: dict[str, Any], after: dict[str, Any]) -> None:
    whole, resumed = before["whole"], after["resumed"]
    assert "error" not in resumed, resumed
    assert before["interrupted"]["stop"] == f"train.exit_interval={LEFT_AFTER} says to leave after step {LEFT_AFTER}"
    for name in ("loss", "grad_norm", "lr", "global_batch_size", "consumed_samples", "num_tokens", "sums"):
        assert before["interrupted"][name] == whole[name][:LEFT_AFTER], name
        assert resumed[name] == whole[name][LEFT_AFTER:], name
    assert resumed["evaluations"] == whole["evaluations"][1:]
    assert resumed["weights"] == whole["weights"]


def test_a_resume_in_another_layout_goes_on_where_it_was(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after["resumed as TP2"]["consumed_samples"] == before["whole"]["consumed_samples"][LEFT_AFTER:]
    assert after["resumed as TP2"]["loss"] == pytest.approx(before["whole"]["loss"][LEFT_AFTER:], abs=1e-5)
