"""Adapters of experts and of latent attention, and Megatron checkpoints of adapters: the same in every layout.

Two gloo processes put adapters on small models of each kind. What they compute is held against `transformers` on the
files that `merge_folder` makes of the same adapter; gradients are held against those of the first layout.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.tiny_mla import MLA_MODELS
from tests.ranks import run_ranks
from transformers import AutoModelForCausalLM

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_export import export_weights
from weightcast.bridges.megatron_checkpoint import load_checkpoint
from weightcast.bridges.peft import CanonicalLoRA, DoRA, LoRA
from weightcast.bridges.peft.merge_files import merge_folder
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.bridges.shards import is_adapter_key
from weightcast.sync.errors import ConfigError

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.parity_job import SMALLEST_GRADIENT, largest_on_any_rank, tokens  # isort: skip
from tests.bridges.adapter_job import build_adapted, logits_difference, run_backward  # isort: skip
from tests.bridges.parity_models import MOE_MODELS, MODELS  # isort: skip
from tests.bridges.tiny_adapters import adapter_tensors  # isort: skip

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient
SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2-sequence-parallel": SPLIT,
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2-ep2-etp1": SPLIT | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
ALPHAS = {"*.layers.2.*.linear_kv_up_proj": 3}
CASES: dict[str, tuple[str, LoRA]] = {
    "experts": ("qwen3-moe-biases-one-dense-layer", LoRA(dim=3, alpha=6, rank_pattern={"linear_fc2": 2})),
    "experts-canonical": ("mixtral-window", CanonicalLoRA(dim=3, alpha=6)),
    "experts-dora": ("qwen2-moe-gated-shared-expert", DoRA(dim=3, alpha=6)),
    "latent": ("deepseek-v3", LoRA(dim=3, alpha=6, target_modules=LATENT, alpha_pattern=ALPHAS)),
}


def write_model(name: str, folder: Path) -> None:
    torch.manual_seed(1)
    config = (MODELS | MOE_MODELS | MLA_MODELS)[name]()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def write_random_adapter(folder: Path, recipe: LoRA) -> None:
    """Of one process's model, whose layout is the first."""
    bridge = AutoBridge.from_hf_pretrained(folder / "model")
    provider = bridge.to_megatron_provider()
    provider.register_pre_wrap_hook(recipe)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in (parameter for parameter in model[0].parameters() if parameter.requires_grad):
            if parameter.ndim == 1:
                parameter.mul_(1 + torch.rand_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    bridge.save_hf_adapter(model, folder / "adapter")
    if dist.get_rank() == 0:
        merge_folder(folder / "model", folder / "adapter", folder / "merged", show_progress=False)
    dist.barrier()


def compare_layouts(out: str, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Differences of logits, and of gradients from the first layout's, by case and layout."""
    differences: dict[str, dict[str, list[float]]] = {}
    for name in names:
        folder, recipe = Path(out, name), CASES[name][1]
        write_random_adapter(folder, recipe)
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
        with torch.no_grad():
            expected = merged(tokens()[:, :-1]).logits
        destroy_model_parallel()
        first: dict[str, torch.Tensor] = {}
        differences[name] = {}
        for layout, sizes in LAYOUTS.items():
            bridge, provider, model = build_adapted(folder, sizes)
            logits = logits_difference(provider, model, expected)
            run_backward(provider, model)
            gradients = dict(export_weights(bridge.adapter_plan(model)))
            first = first or gradients
            worst = max(
                float((tensor - first[key]).abs().max() / first[key].abs().max().clamp_min(SMALLEST_GRADIENT))
                for key, tensor in gradients.items()
            )
            differences[name][layout] = [logits, largest_on_any_rank(worst)]
            destroy_model_parallel()
    return differences


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    out = tmp_path_factory.mktemp("layouts")
    for name, (model, _) in CASES.items():
        write_model(model, out / name / "model")
    first, second = run_ranks(compare_layouts, 2, str(out), list(CASES), env={"CUDA_VISIBLE_DEVICES": ""})
    assert first == second
    result: dict[str, dict[str, list[float]]] = first
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_computes_the_merged_model(
    differences: dict[str, dict[str, list[float]]], case: str, layout: str
) -> None:
    logits, gradients = differences[case][layout]
    assert logits <= TOLERANCE
    assert gradients <= GRADIENT_TOLERANCE


def save_here_load_there(out: str) -> list[str]:
    """A Megatron checkpoint with adapters, from TP2 into PP2 and back to a PEFT folder."""
    folder = Path(out)
    write_random_adapter(folder, LoRA(dim=3))
    destroy_model_parallel()
    bridge, _, model = build_adapted(folder, SPLIT, with_ddp=False)
    keys = sorted(key for key in model[0].sharded_state_dict() if is_adapter_key(key))
    bridge.save_megatron_model(model, folder / "megatron")
    destroy_model_parallel()
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.pipeline_model_parallel_size = 2
    provider.register_pre_wrap_hook(LoRA(dim=3))
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    load_checkpoint(model, folder / "megatron")
    bridge.save_hf_adapter(model, folder / "again")
    return keys


@pytest.mark.slow
def test_megatron_checkpoints_carry_adapters_from_layout_to_layout(tmp_path: Path) -> None:
    write_model("llama-mlp-biases", tmp_path / "model")
    keys, _ = run_ranks(save_here_load_there, 2, str(tmp_path))
    assert "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight" in keys
    assert "decoder.layers.3.mlp.linear_fc1.adapter.linear_out.weight" in keys
    ours, theirs = adapter_tensors(tmp_path / "again"), adapter_tensors(tmp_path / "adapter")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def cut_inside_a_group(folder: str) -> str:
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    try:
        CanonicalLoRA().apply(provider.provide_distributed_model(wrap_with_ddp=False))
    except ConfigError as error:
        return str(error)
    return "taken"


def test_parts_are_not_cut(tmp_path: Path) -> None:
    write_model("llama3-tied-one-kv-head", tmp_path)
    for message in run_ranks(cut_inside_a_group, 2, str(tmp_path)):
        assert "1 query groups over 2 tensor parallel ranks are cut inside a group" in message
