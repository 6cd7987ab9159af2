"""`mixed_precision` and `comm_overlap` in training, on gloo: what Megatron is told, and that the curve stays."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import run_ranks
from tests.trainer.precision_runs import train_with_records
from tests.trainer.runs import words_for

DP2, PP2 = "train.micro_batch_size=2", "model.pipeline_model_parallel_size=2"
VPP2 = "model.virtual_pipeline_model_parallel_size=2"
FP16 = ["mixed_precision=fp16_mixed", DP2]
OVERFLOWING = [*FP16, "mixed_precision.initial_loss_scale=4194304", "mixed_precision.hysteresis=1"]  # 2 to the 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs save, export and keep tokens."""
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def ran(qwen3: Path, texts: list[Path], folder: Path) -> dict[str, Any]:
    """All runs on two ranks."""
    shared = words_for(qwen3, texts, folder / "cache")
    saved, export = f"checkpoint.save={folder / 'fp16'}", "checkpoint.export_hf="
    long = [*OVERFLOWING, "train.train_iters=16"]
    runs = {
        "plain": [DP2],
        "overlapped": [DP2, "comm_overlap.bucket_size=1000"],
        "ddp decides": [DP2, "comm_overlap.bucket_size=1000", "ddp.overlap_param_gather=false"],
        "PP2": [PP2],
        "PP2 one by one": [PP2, "comm_overlap.batch_p2p_comm=false"],
        "by name": ["mixed_precision=bf16_mixed", DP2],
        "by fields": ["mixed_precision.bf16=true", "mixed_precision.params_dtype=bfloat16", DP2],
        "reduced in bf16": ["mixed_precision=bf16_mixed", "mixed_precision.grad_reduce_in_fp32=false", DP2],
        "fp16": [*FP16, "mixed_precision.initial_loss_scale=1024"],
        "fp16 overflowing": [*long, f"{export}{folder / 'whole'}"],
        "fp16 interrupted": [*long, "train.exit_interval=5", saved],
        "fp16 resumed": [*long, f"checkpoint.load={folder / 'fp16'}", f"{export}{folder / 'resumed'}"],
    }
    return _run({name: [*shared, *words] for name, words in runs.items()}, 2)


def _run(runs: dict[str, list[str]], world_size: int) -> dict[str, Any]:
    first, *others = run_ranks(train_with_records, world_size, runs, timeout_s=240)
    for name, result in first.items():
        assert "error" not in result, (name, result)
        assert all(other[name]["loss"] == result["loss"] for other in others)
    results: dict[str, Any] = first
    return results


def test_overlap_reaches_megatrons_buffers_and_leaves_the_curve(ran: dict[str, Any]) -> None:
    plain, overlapped = ran["plain"], ran["overlapped"]
    assert (plain["ddp"]["overlap_grad_reduce"], plain["ddp"]["overlap_param_gather"]) == (False, False)
    assert (overlapped["ddp"]["overlap_grad_reduce"], overlapped["ddp"]["overlap_param_gather"]) == (True, True)
    assert overlapped["ddp"]["bucket_size"] == 1000 and overlapped["buckets"] > 1 == plain["buckets"]
    # Gradient norms are sums over buckets, which round otherwise.
    assert overlapped["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    decided = ran["ddp decides"]
    assert decided["ddp"]["overlap_grad_reduce"] and not decided["ddp"]["overlap_param_gather"]
    assert decided["loss"] == overlapped["loss"]


def test_stages_may_send_one_by_one(ran: dict[str, Any]) -> None:
    assert ran["PP2"]["model"]["batch_p2p_comm"] and not ran["PP2 one by one"]["model"]["batch_p2p_comm"]
    assert ran["PP2 one by one"]["loss"] == ran["PP2"]["loss"]


def test_a_record_is_the_name_it_spells_out(ran: dict[str, Any]) -> None:
    assert ran["by name"]["weights"] == "torch.bfloat16" and ran["by name"]["model"]["bf16"]
    assert ran["by fields"] == ran["by name"]


def test_gradients_are_reduced_in_the_dtype_asked_for(ran: dict[str, Any]) -> None:
    assert (ran["by name"]["gradients"], ran["reduced in bf16"]["gradients"]) == ("torch.float32", "torch.bfloat16")
    assert ran["reduced in bf16"]["loss"] == pytest.approx(ran["by name"]["loss"], abs=2e-2)
    assert ran["reduced in bf16"]["grad_norm"] != ran["by name"]["grad_norm"]


def test_fp16_trains_as_fp32_does(ran: dict[str, Any]) -> None:
    found = ran["fp16"]
    assert (found["weights"], found["gradients"]) == ("torch.float16", "torch.float16")
    assert found["optimizer"]["initial_loss_scale"] == 1024
    assert found["skipped"] == [None] * 4
    assert found["loss"] == pytest.approx(ran["plain"]["loss"], abs=2e-2)
    assert found["grad_norm"] == pytest.approx(ran["plain"]["grad_norm"], rel=0.05)


def test_an_overflow_leaves_its_step_out_and_lowers_the_scale(ran: dict[str, Any]) -> None:
    found = ran["fp16 overflowing"]
    left_out = [reason for reason in found["skipped"] if reason is not None]
    assert 5 < len(left_out) < len(found["skipped"]) - 2, found["skipped"]
    assert found["skipped"][: len(left_out)] == left_out  # first the scale is found, then all steps are taken
    assert left_out[0] == "a gradient overflows fp16; the scale of the loss is 2.09715e+06 now"
    assert math.isnan(found["grad_norm"][0]) and math.isfinite(found["grad_norm"][-1])
    assert found["loss"][-1] < found["loss"][0] - 0.01


def test_the_scale_is_resumed(ran: dict[str, Any]) -> None:
    whole, resumed = ran["fp16 overflowing"], ran["fp16 resumed"]
    assert ran["fp16 interrupted"]["skipped"] == whole["skipped"][:5]
    assert resumed["skipped"] == whole["skipped"][5:]
    assert resumed["loss"] == whole["loss"][5:]
    assert resumed["exported"] == whole["exported"]


@pytest.mark.long
def test_gathering_together_and_with_the_optimizer_leaves_the_curve(
    qwen3: Path, texts: list[Path], tmp_path: Path
) -> None:
    shared = [*words_for(qwen3, texts, tmp_path / "cache"), PP2, VPP2]
    buckets, early = "comm_overlap.bucket_size=1000", "comm_overlap.overlap_param_gather_with_optimizer_step=true"
    runs = {
        "plain": shared,
        "together": [*shared, buckets],
        "each": [*shared, buckets, "comm_overlap.align_param_gather=false"],
        "early": [*shared, buckets, early],
    }
    found = _run(runs, 4)
    assert [found[name]["ddp"]["align_param_gather"] for name in runs] == [False, True, False, True]
    assert [found[name]["synchronised together"] for name in runs] == [False, True, False, True]
    assert found["early"]["optimizer"]["overlap_param_gather_with_optimizer_step"]
    for name in runs:
        assert found[name]["loss"] == pytest.approx(found["plain"]["loss"], abs=1e-6), name
    assert found["each"]["loss"] == found["together"]["loss"]
