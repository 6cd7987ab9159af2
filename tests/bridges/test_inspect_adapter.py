"""`weightcast inspect` of folders that the `peft` library writes: kind, rank, alpha, targets, tensors and bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tests.bridges.parity_models import COMMON, DEFAULT_ROPE
from tests.bridges.support_families import FAMILIES
from tests.bridges.test_layouts_names import CONFIGURATIONS, read_config
from transformers import AutoModelForCausalLM, Qwen2Config

from weightcast.bridges import AutoBridge
from weightcast.bridges.inspect_path import Contents, as_json, inspect_path, render
from weightcast.bridges.peft.describe import FUSED
from weightcast.bridges.rules import FusedQkv, GatedMlp
from weightcast.bridges.rules_experts import PerExpert
from weightcast.sync.errors import CheckpointMismatch, UnsupportedModel

LAYERS, HIDDEN, KEYS = 4, COMMON["hidden_size"], ("q_proj", "k_proj", "v_proj")


def make_adapter(folder: Path, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**COMMON, rope_parameters=DEFAULT_ROPE), dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
    adapted.save_pretrained(folder)
    return adapted


def share_inputs(folder: Path, adapted: PeftModel) -> None:
    """One A for query, key and value of each layer, as adapters of fused linears are saved."""
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".q_proj.lora_A" in name:
                for other in KEYS:
                    parameters[name.replace("q_proj", other)].copy_(parameter)
    adapted.save_pretrained(folder)


def printed(contents: Contents) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(contents, names=True))
    return capture.get()


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    adapted = make_adapter(tmp_path, target_modules=list(KEYS))
    assert inspect_path(tmp_path).kind == "PEFT folder, canonical LoRA"
    share_inputs(tmp_path, adapted)
    assert inspect_path(tmp_path).kind == "PEFT folder, LoRA"
    share_inputs(tmp_path, make_adapter(tmp_path, target_modules=list(KEYS), alpha_pattern={"k_proj": 3}))
    assert inspect_path(tmp_path).kind == "PEFT folder, canonical LoRA"
    make_adapter(tmp_path, target_modules=["q_proj", "o_proj"])
    assert inspect_path(tmp_path).kind == "PEFT folder, canonical LoRA"
    make_adapter(tmp_path, target_modules=["o_proj", "down_proj"])
    assert inspect_path(tmp_path).kind == "PEFT folder, LoRA"
    make_adapter(tmp_path, target_modules=["o_proj"], use_dora=True)
    assert inspect_path(tmp_path).kind == "PEFT folder, DoRA"


def test_what_a_folder_holds_is_said(tmp_path: Path) -> None:
    make_adapter(
        tmp_path,
        target_modules=["o_proj", "down_proj"],
        rank_pattern={"model.layers.1.mlp.down_proj": 2},
        alpha_pattern={"o_proj": 5},
        lora_dropout=0.25,
    )
    contents = inspect_path(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert contents.file_bytes == {file.name: file.stat().st_size}
    assert contents.by_dtype() == {"float32": (4 * LAYERS, sum(spec.num_bytes for spec in contents.specs))}
    said = as_json(contents)
    assert json.loads(json.dumps(said)) == said
    down = {"rank": 4, "alpha": 6.0, "use_rslora": False}
    assert said["adapter"]["targets"] == [
        {"name": "down_proj", "num_modules": LAYERS - 1, "settings": down},
        {"name": "o_proj", "num_modules": LAYERS, "settings": {"rank": 4, "alpha": 5.0, "use_rslora": False}},
        {"name": "down_proj", "num_modules": 1, "settings": down | {"rank": 2}},
    ]
    text = printed(contents)
    assert "rank 4, alpha 6 over rank, other ranks or alphas by module, dropout 0.25; of the base model" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["down_proj", "1", "2", "6", "3"] in rows and ["o_proj", "4", "4", "5", "1.25"] in rows
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in text


def test_damaged_and_other_folders_are_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, target_modules=["o_proj"])
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(UnsupportedModel, match=r"modules_to_save=\['lm_head'\], which is not computed here"):
        inspect_path(tmp_path)
    config.write_text(json.dumps(fields | {"r": 3}))
    with pytest.raises(CheckpointMismatch, match="says r=3; take both files of the same adapter"):
        inspect_path(tmp_path)
    config.write_text(json.dumps(fields))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointMismatch, match="cut short or damaged"):
        inspect_path(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointMismatch, match=r"has no adapter_model\.safetensors"):
        inspect_path(tmp_path)


def test_the_modules_that_are_one_linear_are_those_of_all_families() -> None:
    found = set()
    for model in (model for family in FAMILIES.values() for model in family.models if model in CONFIGURATIONS):
        bridge = AutoBridge.from_hf_config(read_config(model))
        for rule in bridge.family.rules(bridge.hf_config):
            inner = rule.rule if isinstance(rule, PerExpert) else rule
            if isinstance(inner, FusedQkv | GatedMlp) and inner.megatron.endswith(".weight"):
                found.add(tuple(name.removesuffix(".weight").rpartition(".")[2] for name in inner.hf_names))
    assert found == set(FUSED)
