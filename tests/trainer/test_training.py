"""Training in real process groups: the same curve in every layout, and the one that plain PyTorch gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import run_ranks
from tests.trainer.plain_torch import train_plain
from tests.trainer.runs import train_all, words_for

LAYOUTS = {
    "TP2": ["model.tensor_model_parallel_size=2"],
    "TP2 sequence parallel": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "PP2": ["model.pipeline_model_parallel_size=2", "train.micro_batch_size=2"],
    "PP2 VPP2": ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"],
    "DP2": ["train.micro_batch_size=2"],
    "DP2 whole optimizer": ["ddp.use_distributed_optimizer=false"],
    "DP2 overlapped": ["ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true", "train.micro_batch_size=2"],
}
STEPS = 4


@pytest.fixture(scope="module")
def shared_words(qwen3: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs of this module have in common."""
    return words_for(qwen3, texts, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def on_two_ranks(
    shared_words: list[str], gemma3_bf16: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The results of all runs on two ranks."""
    out = tmp_path_factory.mktemp("exports")
    runs = {
        name: [*shared_words, *words, f"checkpoint.export_hf={out / name.replace(' ', '-')}"]
        for name, words in LAYOUTS.items()
    }
    runs["bf16"] = [*shared_words, f"model.hf_path={gemma3_bf16}", "model.tensor_model_parallel_size=2"]
    runs["bf16 DP2"] = [*shared_words, f"model.hf_path={gemma3_bf16}"]
    runs["provider"] = [*shared_words, f"checkpoint.export_hf={out / 'provider'}"]
    first, second = run_ranks(train_all, 2, runs, timeout_s=240)
    assert first == second
    results: dict[str, Any] = first
    return results


@pytest.fixture(scope="module")
def by_plain_torch(qwen3: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """transformers' own model, trained by torch's AdamW on the same batches."""
    return train_plain(qwen3, texts, tmp_path_factory.mktemp("cache"), steps=STEPS, decay=6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_curve_of_plain_torch(
    layout: str, on_two_ranks: dict[str, Any], by_plain_torch: dict[str, list[float]]
) -> None:
    found = on_two_ranks[layout]
    assert "error" not in found, found
    assert found["losses"] == pytest.approx(by_plain_torch["losses"], abs=1e-5)
    assert found["grad_norms"] == pytest.approx(by_plain_torch["grad_norms"], rel=1e-4)


def test_one_process_without_torchrun_has_it_too(
    shared_words: list[str], by_plain_torch: dict[str, list[float]], tmp_path: Path
) -> None:
    events = tmp_path / "events.jsonl"
    command = [sys.executable, "-m", "weightcast.trainer.pretrain", *shared_words, f"logger.events={events}"]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    records = [json.loads(line) for line in Path(f"{events}.0").read_text().splitlines()]
    steps = [record for record in records if record.get("event") == "step"]
    assert [step["loss"] for step in steps] == pytest.approx(by_plain_torch["losses"], abs=1e-5)
    assert [record["version"] for record in records if record.get("phase") == "optimizer"] == [1, 2, 3, 4]
    assert all(record["start_s"] <= record["end_s"] for record in records if "phase" in record)


def test_loss_falls_and_the_rate_follows_the_schedule(on_two_ranks: dict[str, Any]) -> None:
    for name, found in on_two_ranks.items():
        assert found["losses"][-1] < found["losses"][0] - 0.05, name
    assert on_two_ranks["TP2"]["lrs"] == pytest.approx([0.002, 0.0018794229, 0.00155, 0.0011])


def test_a_provider_in_place_of_a_path(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["provider"] == on_two_ranks["TP2"]


def test_bf16_with_fp32_masters_is_the_same_over_tp_and_dp(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["bf16"]["losses"] == pytest.approx(on_two_ranks["bf16 DP2"]["losses"], abs=0.02)


def test_overlapped_gathering_exports_whole_parameters(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["DP2 overlapped"]["weights"] == on_two_ranks["DP2"]["weights"]
