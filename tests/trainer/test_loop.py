"""What happens around a step: evaluation, NaN, signals and limits, recomputation, callbacks. On two ranks."""

from pathlib import Path
from typing import Any

import pytest
from tests.ranks import run_ranks
from tests.trainer.runs import words_for
from tests.trainer.watched import train_watched

STEPS = 4
TP2, DP2 = "model.tensor_model_parallel_size=2", "train.micro_batch_size=2"
EVALUATING = ["train.eval_interval=2", "train.eval_iters=2"]
WSD = [
    "train.train_iters=8",
    "scheduler.lr_decay_style=WSD",
    "scheduler.lr_decay_iters=8",
    "scheduler.lr_warmup_fraction=0.25",
    "scheduler.lr_wsd_decay_iters=4",
    "scheduler.lr_wsd_decay_style=minus_sqrt",
    "scheduler.start_weight_decay=0.0",
    "scheduler.end_weight_decay=0.2",
    "scheduler.weight_decay_incr_style=linear",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs save and keep tokens."""
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def ran(qwen3: Path, texts: list[Path], folder: Path) -> dict[str, Any]:
    """All runs of this module, as rank 0 saw them; rank 1 must have seen the same."""
    shared = [*words_for(qwen3, texts, folder / "cache"), "dataset.split=80,20,0"]
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    parts = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]}
    runs: dict[str, dict[str, Any]] = {
        "plain": {"words": [DP2]},
        "evaluating": {"words": [DP2, *EVALUATING]},
        "evaluating TP2": {"words": [TP2, *EVALUATING, "train.eval_at_start=true"]},
        "nan": {"words": [DP2], "trouble": "nan", "at": 2, "rank": 1},
        "nan skipped": {"words": [DP2, "train.nan_action=skip"], "trouble": "nan", "at": 1, "rank": 1},
        "named": {"words": [DP2, "train.iterations_to_skip=[2]"]},
        "signal": {"words": [DP2, f"checkpoint.save={folder / 'signal'}"], "trouble": "signal", "at": 2, "rank": 1},
        "after the signal": {"words": [DP2, f"checkpoint.load={folder / 'signal'}"]},
        "duration": {"words": [DP2, "train.exit_duration_in_mins=1e-9"]},
        "interval": {"words": [DP2, "train.exit_interval=3", "logger.straggler_interval=2"]},
        "recompute": {"words": [DP2], "provider": recompute},
        "recompute parts": {"words": [TP2], "provider": parts | {"tensor_model_parallel_size": 2}},
        "garbage": {"words": [DP2, "train.manual_gc=true", "train.manual_gc_interval=2"]},
        "WSD": {"words": [DP2, *WSD]},
    }
    for name, run in runs.items():
        words = [word for word in run["words"] if "provider" not in run or not word.startswith("model.")]
        tokenizer = [f"tokenizer.tokenizer_model={qwen3}"]
        runs[name] = run | {"words": [*shared, *tokenizer, *words]}
    first, second = run_ranks(train_watched, 2, runs, timeout_s=240)
    for name, result in first.items():
        assert result["told"] == second[name]["told"]
        assert result.get("loss") == pytest.approx(second[name].get("loss"), nan_ok=True)
    both: dict[str, Any] = first | {f"{name} on rank 1": result for name, result in second.items()}
    return both


def test_evaluation_leaves_training_as_it_was(ran: dict[str, Any]) -> None:
    assert ran["evaluating"]["loss"] == ran["plain"]["loss"]
    assert ran["evaluating"]["told"] == ["start 0", "step 1", "step 2", "eval 2", "step 3", "step 4", "eval 4", "end 4"]


def test_evaluation_is_the_same_in_every_layout_and_falls(ran: dict[str, Any]) -> None:
    first, last = ran["evaluating"]["evaluations"]
    before, *others = ran["evaluating TP2"]["evaluations"]
    assert others == pytest.approx([first, last], abs=1e-5)
    assert ran["evaluating TP2"]["told"][:3] == ["start 0", "eval 0", "step 1"]
    assert before > first
    assert last < first - 0.05


def test_a_nan_stops_all_ranks_and_says_where(ran: dict[str, Any]) -> None:
    for name in ("nan", "nan on rank 1"):
        error = ran[name]["error"]
        assert error.startswith("DivergedError: step 3: the loss is nan")
        assert "train.iterations_to_skip=[3]" in error
        assert ran[name]["told"] == ["start 0", "step 1", "step 2"]


def test_a_nan_is_skipped_where_settings_say_so(ran: dict[str, Any]) -> None:
    found = ran["nan skipped"]
    assert found["skipped"] == [None, "the loss is nan", None, None]
    assert found["sums"][0] == found["sums"][1] != found["sums"][2]
    assert found["lr"][1] == found["lr"][2]  # the schedule waits as well


def test_named_steps_pass_over_their_samples(ran: dict[str, Any]) -> None:
    found = ran["named"]
    assert [reason is None for reason in found["skipped"]] == [True, False, True, True]
    assert found["loss"][0] == ran["plain"]["loss"][0]
    # As when a NaN skipped that step: the weights of step 1 meet the samples of step 3.
    assert found["loss"][2:] == ran["nan skipped"]["loss"][2:]


def test_a_signal_to_one_rank_saves_and_ends_all(ran: dict[str, Any], folder: Path) -> None:
    for name in ("signal", "signal on rank 1"):
        found = ran[name]
        assert (found["stop"], found["status"]) == ("signal SIGUSR1 after step 2", 138)
        assert found["saved"] == ["iter_0000002"]
        assert not found["is_complete"]
    assert (folder / "signal/latest_checkpointed_iteration.txt").read_text() == "2"
    assert ran["after the signal"]["loss"] == ran["plain"]["loss"][2:]


def test_limits_end_a_run(ran: dict[str, Any]) -> None:
    assert ran["duration"]["stop"].startswith("train.exit_duration_in_mins=1e-09 have passed at step 0")
    assert ran["interval"]["stop"] == "train.exit_interval=3 says to leave after step 3"
    assert ran["interval"]["status"] == 0
    assert ran["plain"]["stop"] == "all 4 steps are done"


@pytest.mark.parametrize("name", ["recompute", "recompute parts", "garbage"])
def test_saving_memory_changes_no_loss(name: str, ran: dict[str, Any]) -> None:
    assert "error" not in ran[name], ran[name]
    assert ran[name]["loss"] == pytest.approx(ran["plain"]["loss"], abs=1e-5)
    assert ran[name]["grad_norm"] == pytest.approx(ran["plain"]["grad_norm"], rel=1e-4)


def test_wsd_with_warmup_and_rising_weight_decay(ran: dict[str, Any]) -> None:
    high, low = 2e-3, 2e-4
    falling = [low + (high - low) * (1 - (step / 4) ** 0.5) for step in (1, 2, 3)]
    assert ran["WSD"]["lr"] == pytest.approx([0.0, high / 2, high, high, high, *falling])
    assert ran["WSD"]["weight_decay"] == pytest.approx([0.2 * step / 8 for step in range(8)])


def test_figures_are_there(ran: dict[str, Any]) -> None:
    tokens_per_s, tflops, memory_bytes = ran["plain"]["rates"]
    assert tokens_per_s > 0 and tflops > 0 and memory_bytes > 100e6
    assert ran["plain"]["phases"] == ["data", "forward", "forward_backward", "optimizer"]
    assert all(0 < tokens <= 8 * 16 for tokens in ran["plain"]["num_tokens"])
