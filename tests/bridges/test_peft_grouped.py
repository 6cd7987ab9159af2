"""Adapters of grouped experts are those of the same experts one by one: values, gradients, files, checkpoints.

Two gloo processes build models whose experts are Megatron's `TEGroupedMLP` (see `grouped_linears`). Outputs are held
against `transformers` on the merged model, gradients against those of Megatron's `SequentialMLP`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.ranks import run_ranks
from transformers import AutoModelForCausalLM

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_export import export_weights
from weightcast.bridges.megatron_checkpoint import load_checkpoint
from weightcast.bridges.peft import LoRA, merged_adapters
from weightcast.bridges.peft.grouped import AdaptedGroupedLinear
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.errors import ConfigError

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.adapter_job import build_adapted, logits_difference, run_backward  # isort: skip
from tests.bridges.grouped_linears import grouped_experts  # isort: skip
from tests.bridges.parity_job import SMALLEST_GRADIENT, largest_on_any_rank, tokens  # isort: skip
from tests.bridges.test_peft_layouts import CASES, LAYOUTS, write_model, write_random_adapter  # isort: skip

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient
EXPERTS = [name for name in CASES if name.startswith("experts")]


def num_grouped(model: list[Any]) -> int:
    """Experts of adapted grouped linears on this rank."""
    linears = [module for chunk in model for module in chunk.modules() if isinstance(module, AdaptedGroupedLinear)]
    return sum(len(linear.experts()) for linear in linears)


def worst_of(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, of its largest value; on any rank."""
    assert ours.keys() <= theirs.keys()
    differences = [
        float((tensor - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(SMALLEST_GRADIENT))
        for name, tensor in ours.items()
    ]
    return largest_on_any_rank(max(differences, default=0.0))


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an HF folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged_difference(bridge: AutoBridge, model: list[Any], expected: dict[str, torch.Tensor]) -> float:
    """Of merged weights from those of `merge_folder`; what engines get without merging has the same bits."""
    source = bridge.merged_source(model)
    source.prepare()
    own = {held.region: held.live() for held in source.held() if ".experts." in held.region.name}
    with merged_adapters(model):
        in_place = dict(export_weights(bridge.plan(model)))
    assert own and all(torch.equal(part, in_place[region.name][region.slices]) for region, part in own.items())
    return worst_of(in_place, expected)


def check_case(folder: Path, layout: str) -> dict[str, Any]:
    """Everything about one adapter in one layout of grouped experts."""
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = merged(tokens()[:, :-1]).logits
    with grouped_experts():
        bridge, provider, model = build_adapted(folder, LAYOUTS[layout])
        found: dict[str, Any] = {"experts": num_grouped(model)}
        found["logits"] = logits_difference(provider, model, logits)
        found["merged"] = merged_difference(bridge, model, load_folder(folder / "merged"))
        bridge.save_hf_adapter(model, folder / f"adapter-{layout}")
        run_backward(provider, model)
        gradients = dict(export_weights(bridge.adapter_plan(model)))
        destroy_model_parallel()
    _, provider, model = build_adapted(folder, {})
    assert not num_grouped(model)
    run_backward(provider, model)
    expected = dict(export_weights(bridge.adapter_plan(model)))
    destroy_model_parallel()
    return found | {"gradients": worst_of(gradients, expected), "num_gradients": len(gradients)}


def check_cases(out: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    results = []
    for name, layout in cases:
        folder = Path(out, name)
        if not (folder / "adapter").exists():
            write_random_adapter(folder, CASES[name][1])
            destroy_model_parallel()
        results.append(check_case(folder, layout))
    return results


def check(cases: list[list[str]], out: Path) -> None:
    for name in {name for name, _ in cases}:
        write_model(CASES[name][0], out / name / "model")
    first, second = run_ranks(check_cases, 2, str(out), cases, env={"CUDA_VISIBLE_DEVICES": ""}, timeout_s=400)
    for (name, layout), found, other in zip(cases, first, second, strict=True):
        assert found["experts"] > 0 and other["experts"] > 0, (name, layout)
        assert found["logits"] <= TOLERANCE and found["merged"] <= 1e-6, (name, layout, found)
        assert found["gradients"] <= GRADIENT_TOLERANCE and found["num_gradients"] > 0, (name, layout, found)
        ours, theirs = (
            load_file(out / name / adapter / "adapter_model.safetensors")
            for adapter in (f"adapter-{layout}", "adapter")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_adapters_of_grouped_experts(tmp_path: Path) -> None:
    layouts = ("ep2", "tp2-sequence-parallel", "tp2-ep2-etp1")
    check([[name, layout] for name, layout in zip(EXPERTS, layouts, strict=True)], tmp_path)


@pytest.mark.long
def test_adapters_of_grouped_experts_in_every_layout(tmp_path: Path) -> None:
    check([[name, layout] for name in EXPERTS for layout in LAYOUTS], tmp_path)


def from_grouped_to_sequential(out: str) -> list[str]:
    """Fresh adapters, which are the same for both; then a Megatron checkpoint of one into the other."""
    folder, recipe = Path(out), LoRA(dim=3)
    bridge = AutoBridge.from_hf_pretrained(folder / "model")

    def provide(**sizes: int) -> list[Any]:
        provider = bridge.to_megatron_provider()
        for name, value in sizes.items():
            setattr(provider, name, value)
        provider.register_pre_wrap_hook(recipe)
        model: list[Any] = provider.provide_distributed_model(wrap_with_ddp=False)
        return model

    with grouped_experts():
        model = provide(expert_model_parallel_size=2)
        bridge.save_hf_adapter(model, folder / "grouped")
        torch.manual_seed(dist.get_rank())
        with torch.no_grad():
            for parameter in (parameter for parameter in model[0].parameters() if parameter.requires_grad):
                parameter.copy_(torch.randn_like(parameter))
        bridge.save_megatron_model(model, folder / "megatron")
        bridge.save_hf_adapter(model, folder / "grouped-random")
        destroy_model_parallel()
    model = provide()
    bridge.save_hf_adapter(model, folder / "sequential")
    load_checkpoint(model, folder / "megatron")
    bridge.save_hf_adapter(model, folder / "sequential-random")
    destroy_model_parallel()
    with grouped_experts():
        model = provide(tensor_model_parallel_size=2)
        load_checkpoint(model, folder / "megatron")
        bridge.save_hf_adapter(model, folder / "back")
    return sorted(key for key in model[0].sharded_state_dict() if ".experts." in key and ".adapter." in key)


@pytest.mark.slow
def test_checkpoints_of_grouped_experts_load_into_sequential_ones(tmp_path: Path) -> None:
    write_model("mixtral-window", tmp_path / "model")
    keys, _ = run_ranks(from_grouped_to_sequential, 2, str(tmp_path))
    assert "decoder.layers.0.mlp.experts.linear_fc1.adapter.1.linear_out.weight" in keys
    files = {
        name: load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("grouped", "sequential", "grouped-random", "sequential-random", "back")
    }
    for one, other in (("grouped", "sequential"), ("grouped-random", "sequential-random"), ("grouped-random", "back")):
        assert files[one].keys() == files[other].keys()
        assert all(torch.equal(files[one][key], files[other][key]) for key in files[one]), (one, other)
    assert any(".experts." in key for key in files["grouped"])
    assert any(not torch.equal(files["grouped"][key], files["grouped-random"][key]) for key in files["grouped"])


def test_a_fused_mlp_would_pass_by_adapters() -> None:
    from tests.bridges.test_experts import translate

    provider = translate("Qwen3MoeForCausalLM")
    provider.use_transformer_engine_op_fuser = True
    provider.register_pre_wrap_hook(LoRA(dim=2))
    with pytest.raises(ConfigError, match=r"use_transformer_engine_op_fuser computes MLPs .* past the adapters"):
        provider.provide_distributed_model(wrap_with_ddp=False)
