"""Runs with adapters: exact resumes, other bases, recomputed layers, methods of one's own; and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.bridges.tiny_models import write_tiny_model
from tests.ranks import run_ranks
from tests.trainer.peft_runs import same_files, save_both_ways, train_adapters
from tests.trainer.runs import words_for

# After weightcast, which holds back Megatron's import-time notices.
from megatron.core import dist_checkpointing  # isort: skip

TWO, FOUR = "train.train_iters=2", "train.train_iters=4"
TP2 = "model.tensor_model_parallel_size=2"
LORA = ("peft.scheme=lora", "peft.dim=4")
DORA = ("peft.scheme=dora", "peft.dim=4", "peft.dropout=0.1", "mixed_precision=bf16_mixed")
FIRST_LAYER = (*LORA, "peft.target_modules=['*.layers.0.*.linear_fc2']")
OWN = ("peft.scheme=examples.own_adapter:Gains", "peft.target_modules=[linear_fc2]")
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def words(qwen3: Path, texts: list[Path], folder: Path) -> list[str]:
    return [*words_for(qwen3, texts, folder / "cache"), "train.micro_batch_size=4"]


@pytest.fixture(scope="module")
def before(words: list[str], folder: Path) -> dict[str, Any]:
    """Whole runs, and runs that stop half-way."""
    saves_base = (f"checkpoint.save={folder / 'base'}", f"checkpoint.export_hf={folder / 'hf'}")
    both = (f"checkpoint.save={folder / 'own'}", f"checkpoint.export_hf={folder / 'own-merged'}")
    return _run(
        {
            "dora four": [*DORA, TP2, FOUR, f"peft.export_adapter={folder / 'four'}"],
            "dora two": [*DORA, TP2, TWO, f"checkpoint.save={folder / 'dora'}"],
            "base": [TWO, *saves_base],
            "first layer": [*FIRST_LAYER],
            "own": [*OWN, *both],
        },
        words,
        {"first layer recomputed": {"words": [*words, *FIRST_LAYER], "sizes": RECOMPUTE}},
    )


@pytest.fixture(scope="module")
def after(before: dict[str, Any], words: list[str], texts: list[Path], qwen3: Path, folder: Path) -> dict[str, Any]:
    """In fresh processes: what goes on from there, and what must not."""
    assert all("error" not in found for found in before.values()), before
    other = write_tiny_model("llama2", folder / "other")
    resumes = (f"checkpoint.load={folder / 'dora'}", f"peft.export_adapter={folder / 'resumed'}")
    base = f"checkpoint.pretrained_checkpoint={folder / 'base'}"
    return _run(
        {
            "dora": [*DORA, TP2, FOUR, *resumes],
            "from base": [*LORA, TP2, TWO, base],
            "from hf": [*LORA, TWO, f"model.hf_path={folder / 'hf'}", f"tokenizer.tokenizer_model={qwen3}"],
            "own": [*OWN, "train.train_iters=5", f"checkpoint.load={folder / 'own'}"],
            "whole into adapters": [*LORA, f"checkpoint.load={folder / 'base'}"],
            "adapters into whole": [f"checkpoint.load={folder / 'dora'}"],
            "other settings": [*DORA, "peft.dim=8", f"checkpoint.load={folder / 'dora'}"],
            "adapters as base": [*LORA, f"checkpoint.pretrained_checkpoint={folder / 'dora'}"],
            "no base": [*LORA, f"checkpoint.pretrained_checkpoint={folder / 'nowhere'}"],
            "base of another": [*LORA, f"model.hf_path={other}", base],
            "adapter of another": [f"model.hf_path={other}", f"peft.load_adapter={folder / 'four'}"],
            "no adapter": [f"peft.load_adapter={folder / 'nowhere'}"],
            "other adapter": [*LORA, f"peft.load_adapter={folder / 'four'}"],
            "no such target": [*LORA, "peft.target_modules=[linear_qv]"],
        },
        words,
    )


def _run(given: dict[str, list[str]], words: list[str], more: Runs | None = None) -> dict[str, Any]:
    runs: Runs = {name: {"words": [*words, *own]} for name, own in given.items()}
    first, second = run_ranks(train_adapters, 2, runs | (more or {}), timeout_s=300)
    assert first == second
    results: dict[str, Any] = first
    return results


def test_resume_is_exact(before: dict[str, Any], after: dict[str, Any], folder: Path) -> None:
    whole, resumed = before["dora four"], after["dora"]
    assert "error" not in resumed, resumed
    assert before["dora two"]["losses"] == whole["losses"][:2]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["grad_norms"] == whole["grad_norms"][2:]
    ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("resumed", "four"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_checkpoint_holds_adapters_alone(before: dict[str, Any], folder: Path) -> None:
    assert before
    saved = folder / "dora" / "iter_0000002"
    assert (saved / "peft.json").is_file()
    keys = set(dist_checkpointing.load_tensors_metadata(str(saved)))
    assert "decoder.layers.3.mlp.linear_fc2.adapter.linear_in.weight" in keys
    assert all(".adapter." in key for key in keys), keys


def test_a_base_may_be_a_checkpoint_of_training(after: dict[str, Any]) -> None:
    assert "error" not in after["from base"], after["from base"]
    assert after["from base"]["losses"] == pytest.approx(after["from hf"]["losses"], abs=1e-5)


def test_recomputed_layers_behind_a_frozen_embedding_train(before: dict[str, Any]) -> None:
    plain, recomputed = before["first layer"], before["first layer recomputed"]
    assert plain["grad_norms"][0] > 1e-3
    assert recomputed["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert recomputed["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-4)


def test_a_method_of_ones_own_trains_resumes_and_is_merged(
    before: dict[str, Any], after: dict[str, Any], folder: Path, qwen3: Path
) -> None:
    assert before["own"]["losses"][-1] < before["own"]["losses"][0]
    assert "error" not in after["own"], after["own"]
    base, merged = load_file(qwen3 / "model.safetensors"), load_file(folder / "own-merged" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("whole into adapters", "start them from it with checkpoint.pretrained_checkpoint"),
        ("adapters into whole", "holds adapters alone (DoRA), and this run trains all weights"),
        ("other settings", "holds other adapters: dim is 4 there and 8 here"),
        ("adapters as base", "holds adapters only; name the checkpoint of their base"),
        ("no base", "there is no folder"),
        ("base of another", "is not of this model"),
        ("adapter of another", "the adapter was trained on another base model"),
        ("no adapter", "is no folder; name one that peft saved"),
        ("other adapter", "has True as use_dora, the model's adapters have False"),
        ("no such target", "no linear of the model; did you mean 'linear_qkv'"),
    ],
)
def test_what_does_not_fit_is_refused(run: str, message: str, after: dict[str, Any]) -> None:
    assert message in after[run].get("error", "trained"), after[run]


def test_merged_views_have_the_bits_of_merging(gemma3_bf16: Path, texts: list[Path], tmp_path: Path) -> None:
    words = [*words_for(gemma3_bf16, texts, tmp_path / "cache"), *DORA, TP2]
    assert run_ranks(save_both_ways, 2, words, [str(text) for text in texts], str(tmp_path)) == [True, True]
    assert same_files(tmp_path / "views", tmp_path / "merged")
    assert not same_files(tmp_path / "views", gemma3_bf16)
