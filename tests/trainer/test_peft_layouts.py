"""Runs with adapters in other layouts: resumed there, with stages that hold nothing to train, and latent attention."""

from pathlib import Path
from typing import Any

import pytest
from tests.bridges.tiny_mla import make_mla_model
from tests.bridges.tiny_models import write_tiny_model
from tests.ranks import run_ranks
from tests.trainer.peft_runs import train_adapters
from tests.trainer.runs import words_for

pytestmark = pytest.mark.long
TP2, PP2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
LORA = ("peft.scheme=lora", "peft.dim=4")
FIRST_LAYER = (*LORA, "peft.target_modules=['*.layers.0.*.linear_fc2']")
LAST_LAYER = (*LORA, "peft.target_modules=['*.layers.3.*.linear_fc2']")


@pytest.fixture(scope="module")
def found(qwen3: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    words = [*words_for(qwen3, texts, folder / "cache"), "train.micro_batch_size=4"]
    runs = {
        "six": [*LORA, "train.train_iters=6"],
        "three": [*LORA, TP2, "train.train_iters=3", f"checkpoint.save={folder / 'lora'}"],
        "resumed": [*LORA, PP2, "train.train_iters=6", f"checkpoint.load={folder / 'lora'}"],
        "first layer": [*FIRST_LAYER],
        "first layer PP2": [*FIRST_LAYER, PP2],
        "last layer": [*LAST_LAYER],
        "last layer PP2": [*LAST_LAYER, PP2],
    }
    first, second = run_ranks(
        train_adapters, 2, {name: {"words": [*words, *own]} for name, own in runs.items()}, timeout_s=300
    )
    assert first == second
    assert all("error" not in result for result in first.values()), first
    return dict(first)


def test_another_layout_goes_on_with_the_same_curve(found: dict[str, Any]) -> None:
    assert found["three"]["losses"] == pytest.approx(found["six"]["losses"][:3], abs=1e-5)
    assert found["resumed"]["losses"] == pytest.approx(found["six"]["losses"][3:], abs=1e-5)


@pytest.mark.parametrize("layer", ["first layer", "last layer"])
def test_a_stage_may_have_nothing_to_train(layer: str, found: dict[str, Any]) -> None:
    assert found[layer]["grad_norms"][0] > 1e-3
    assert found[f"{layer} PP2"]["losses"] == pytest.approx(found[layer]["losses"], abs=1e-5)
    assert found[f"{layer} PP2"]["grad_norms"] == pytest.approx(found[layer]["grad_norms"], rel=1e-4)


def test_latent_attention_and_its_experts_in_layouts(texts: list[Path], tmp_path: Path) -> None:
    write_tiny_model("qwen2", tmp_path / "model")  # for its tokenizer
    make_mla_model("deepseek-v3").save_pretrained(tmp_path / "model")
    words = [*words_for(tmp_path / "model", texts, tmp_path / "cache"), *LORA, "train.micro_batch_size=4"]
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    layouts = {
        "DP2": {},
        "TP2": split,
        "PP2": {"pipeline_model_parallel_size": 2},
        "EP2": {"expert_model_parallel_size": 2},
        "TP2 EP2": split | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    }
    # Megatron balances within a micro-batch, so the loss for it depends on the layout.
    balance = {"moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "none"}
    runs = {name: {"words": words, "sizes": sizes | balance} for name, sizes in layouts.items()}
    first, second = run_ranks(train_adapters, 2, runs, timeout_s=240)
    assert first == second
    for name, found in first.items():
        assert "error" not in found, (name, found)
        assert found["losses"] == pytest.approx(first["DP2"]["losses"], abs=1e-5), name
        assert found["grad_norms"] == pytest.approx(first["DP2"]["grad_norms"], rel=1e-4), name
