"""Adapters in the trainer are those of the `peft` library: first gradients, the curve, and the merged model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.bridges.tiny_models import write_tiny_model
from tests.ranks import run_ranks
from tests.trainer.peft_reference import ALPHA, RANK, make_reference
from tests.trainer.peft_runs import train_adapters, train_alone
from tests.trainer.runs import SEQ_LENGTH, words_for
from transformers import AutoConfig, AutoModelForCausalLM

from weightcast.trainer.data.packing import load_or_pack
from weightcast.trainer.data.samples import Batches
from weightcast.trainer.data.text_samples import text_splits

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# Fused experts, as transformers stacks them, beside an A each for q, k and v.
EXPERT_TARGETS = "[linear_q,linear_k,linear_v,linear_proj,linear_fc1,linear_fc2]"
STEPS = 4
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A tiny model, the scheme's settings, and which linears share an A in it."""

    model: str
    words: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...] = ()


CASES = {
    "llama-canonical": Case("llama3.1", ("peft.scheme=canonical_lora",)),
    "llama-fused": Case("llama3.1", ("peft.scheme=lora",), (QKV, GATE_UP)),
    "qwen3-canonical": Case("qwen3-tied", ("peft.scheme=canonical_lora",)),
    "qwen3-dora-fused": Case("qwen3-tied", ("peft.scheme=dora",), (QKV, GATE_UP)),
    "qwen3-moe": Case("qwen3-moe", ("peft.scheme=canonical_lora", f"peft.target_modules={EXPERT_TARGETS}")),
    "llama-dora": Case(
        "llama3.1",
        (
            "peft.scheme=dora",
            "peft.target_modules=[linear_q,linear_k,linear_v,linear_proj,linear_fc1_gate,linear_fc1_up,linear_fc2]",
        ),
    ),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "DP2": {},
}
# MoE under TP wants sequence parallelism.
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {name: sizes for name, sizes in LAYOUTS.items() if name != "TP2"} | {
    "EP2": {"expert_model_parallel_size": 2},
    "TP2 EP2": LAYOUTS["TP2 sequence parallel"] | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
QUICK = ("llama-fused", "qwen3-dora-fused", "qwen3-moe")


@dataclass(frozen=True)
class Computed:
    """What the trainer made of a case, in `folder`, and what `peft` computes from the same adapter."""

    name: str
    folder: Path
    words: list[str]
    ours: dict[str, Any]
    theirs: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Of one of the PEFT folders."""
        return dict(load_file(self.folder / name / "adapter_model.safetensors"))


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def case(request: pytest.FixtureRequest, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Computed:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    write_model(CASES[name].model, folder / "model")
    words = [
        *words_for(folder / "model", texts, folder / "cache"),
        *(*CASES[name].words, f"peft.dim={RANK}", f"peft.alpha={ALPHA}", "train.micro_batch_size=8"),
    ]
    (ours,) = run_ranks(train_alone, 1, words, [str(text) for text in texts], str(folder))
    assert "error" not in ours, ours
    return Computed(name, folder, words, ours, by_peft(name, folder, texts))


def write_model(name: str, folder: Path) -> None:
    """A tiny model; of experts one without loss for their balance, which `peft`'s run has not."""
    write_tiny_model(name, folder)
    if name == "qwen3-moe":
        # `peft` finds experts by one rule for the whole model, so all layers have them.
        config = AutoConfig.from_pretrained(folder, mlp_only_layers=[], router_aux_loss_coef=0.0)
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def by_peft(name: str, folder: Path, texts: list[Path]) -> dict[str, Any]:
    stream = load_or_pack(texts, str(folder / "model"), folder / "cache")
    samples, *_ = text_splits(stream, seq_length=SEQ_LENGTH, seed=1234, split=None)
    batches = Batches(samples, micro_batch_size=8, global_batch_size=8)
    reference = make_reference(folder / "model", use_dora="dora" in name, shared=CASES[name].shared)
    reference.set_values(folder / "adapter")
    (batch,) = batches.of_step(consumed_samples=0, data_parallel_rank=0, data_parallel_size=1)
    gradients = reference.gradients(batch)
    curve = reference.train(batches, STEPS)
    values = {key: view(parameter).clone() for key, (parameter, view) in reference.places.items()}
    with torch.no_grad():
        merged_logits = reference.model.merge_and_unload()(input_ids=batch.tokens).logits
    return {"gradients": gradients, "values": values, "tokens": batch.tokens, "merged_logits": merged_logits} | curve


def test_first_gradients_are_those_of_peft(case: Computed) -> None:
    ours, theirs = case.tensors("gradients"), case.theirs["gradients"]
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert (ours[key] - gradient).abs().max() <= TOLERANCE, key
    assert max(gradient.abs().max() for gradient in theirs.values()) > 100 * TOLERANCE


def test_a_run_has_the_curve_of_peft(case: Computed) -> None:
    assert case.ours["losses"] == pytest.approx(case.theirs["losses"], abs=TOLERANCE)
    assert case.ours["grad_norms"] == pytest.approx(case.theirs["grad_norms"], rel=1e-4)
    trained = case.tensors("trained")
    for key, value in case.theirs["values"].items():
        assert (trained[key] - value).abs().max() <= 1e-4, key


def test_the_exported_model_is_merge_and_unload(case: Computed) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.folder / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=case.theirs["tokens"]).logits
    # Both trained four steps from the same adapters; what differs is the order of sums.
    assert (logits - case.theirs["merged_logits"]).abs().max() <= 1e-4


# `peft` turns adapters of single experts into those of a stack, by a pattern that it then warns of.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_peft_loads_what_a_run_exports(case: Computed) -> None:
    tokens = torch.arange(3, 35).view(2, 16)
    base = AutoModelForCausalLM.from_pretrained(case.folder / "model", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, case.folder / "trained").eval()
    ours = AutoModelForCausalLM.from_pretrained(case.folder / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert (ours(input_ids=tokens).logits - loaded(input_ids=tokens).logits).abs().max() <= TOLERANCE
        merged = loaded.merge_and_unload()
    for (key, tensor), other in zip(ours.named_parameters(), merged.parameters(), strict=True):
        assert (tensor - other).abs().max() <= 1e-6, key


def test_only_adapters_are_buffered_and_optimised(case: Computed) -> None:
    held = case.ours["held"]
    assert held["trained"] == held["buffered"] == held["moments"] > 0
    assert held["frozen_with_gradient"] == 0


@pytest.mark.long
def test_every_layout_has_the_curve_of_peft(case: Computed) -> None:
    words = [*case.words, f"peft.load_adapter={case.folder / 'adapter'}", "train.micro_batch_size=4"]
    layouts = EXPERT_LAYOUTS if case.name == "qwen3-moe" else LAYOUTS
    runs = {name: {"words": words, "sizes": sizes} for name, sizes in layouts.items()}
    first, second = run_ranks(train_adapters, 2, runs, timeout_s=300)
    assert first == second
    for name, found in first.items():
        assert "error" not in found, (name, found)
        assert found["losses"] == pytest.approx(case.theirs["losses"], abs=TOLERANCE), name
        assert found["grad_norms"] == pytest.approx(case.theirs["grad_norms"], rel=1e-4), name
