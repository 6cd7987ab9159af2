"""What adapters and their folders are refused for, in one process: each error names the thing and the remedy."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightcast.bridges import AutoBridge
from weightcast.bridges.peft import CanonicalLoRA, DoRA, LoRA, merge_adapters, merged_adapters, unmerge_adapters
from weightcast.bridges.peft.folder import read_adapter
from weightcast.bridges.peft.merge_files import merge_folder
from weightcast.bridges.process_groups import destroy_distributed
from weightcast.sync.errors import CheckpointMismatch, ConfigError, UnsupportedModel

RANK = 4
PREFIX = "base_model.model.model.layers"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture(scope="module")
def bridge(tiny_models: Path) -> AutoBridge:
    return AutoBridge.from_hf_pretrained(tiny_models / "qwen2")


def build(bridge: AutoBridge, recipe: LoRA | None = None, with_ddp: bool = False) -> Any:
    provider = bridge.to_megatron_provider()
    provider.finalize()
    if recipe is not None:
        provider.register_pre_wrap_hook(recipe)
    return provider.provide_distributed_model(wrap_with_ddp=with_ddp)


@pytest.fixture
def folder(bridge: AutoBridge, tmp_path: Path) -> Path:
    """A PEFT folder with one A for query, key and value."""
    bridge.save_hf_adapter(build(bridge, LoRA(dim=RANK, alpha=8, target_modules=["linear_qkv"])), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_settings(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_only_adapters_train_and_they_start_as_no_change(bridge: AutoBridge) -> None:
    (chunk,) = build(bridge, DoRA(dim=RANK))
    trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in chunk.named_parameters() if ".adapter." in name}
    linear = chunk.decoder.layers[0].self_attention.linear_proj
    x = torch.randn(3, 2, linear.weight.shape[1])
    adapted, _ = linear(x)
    torch.testing.assert_close(adapted, x @ linear.weight.T)
    assert {name for name, _ in linear.named_parameters()} == {
        "weight",
        "adapter.linear_in.weight",
        "adapter.linear_out.weight",
        "adapter.weight_magnitude",
    }


def test_dropout_is_of_training_only(bridge: AutoBridge) -> None:
    for recipe in (
        LoRA(dim=RANK, dropout=0.5),
        DoRA(dim=RANK, dropout=0.5),
        LoRA(dropout=0.5, dropout_position="post"),
    ):
        (chunk,) = build(bridge, recipe)
        linear = chunk.decoder.layers[0].self_attention.linear_qkv
        with torch.no_grad():
            linear.adapter.linear_out.weight.normal_()
        x = torch.randn(3, 2, linear.weight.shape[1])
        assert not torch.equal(linear(x)[0], linear(x)[0])
        chunk.eval()
        assert torch.equal(linear(x)[0], linear(x)[0])


def test_a_target_that_is_not_there_is_refused(bridge: AutoBridge) -> None:
    with pytest.raises(ConfigError, match=r"'linear_qvk', which is no linear of the model; did you mean 'linear_qkv'"):
        build(bridge, LoRA(target_modules=["linear_proj", "linear_qvk"]))


@pytest.mark.parametrize("key", ["linear_fc1", "linear_k", "linear_qvk", "*.layers.9.*.linear_q"])
def test_a_pattern_that_means_no_adapter_is_refused(bridge: AutoBridge, key: str) -> None:
    with pytest.raises(ConfigError, match=f"names '{re.escape(key)}', which means none of the adapters"):
        build(bridge, CanonicalLoRA(target_modules=["linear_q", "linear_proj"], rank_pattern={key: 4}))


def test_a_second_recipe_and_a_wrapped_model_are_refused(bridge: AutoBridge) -> None:
    with pytest.raises(ConfigError, match="has adapters already"):
        LoRA().apply(build(bridge, LoRA()))
    with pytest.raises(ConfigError, match="register_pre_wrap_hook"):
        LoRA().apply(build(bridge, with_ddp=True))


def test_a_model_without_adapters_has_none_to_save_or_merge(bridge: AutoBridge, tmp_path: Path) -> None:
    model = build(bridge)
    with pytest.raises(ConfigError, match="has no adapters"):
        bridge.save_hf_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_adapters(model)


def test_weights_do_not_leave_without_their_adapters(bridge: AutoBridge, tmp_path: Path) -> None:
    model = build(bridge, CanonicalLoRA(dim=RANK))
    source = bridge.weight_source(model)
    with pytest.raises(ConfigError, match="not merged"):
        source.held()[0].live()
    with pytest.raises(ConfigError, match="not merged"):
        bridge.save_hf_pretrained(model, tmp_path / "out", show_progress=False)
    with pytest.raises(ConfigError, match="not merged"):
        list(bridge.export_hf_weights(model, show_progress=False))
    assert not (tmp_path / "out").exists()
    with merged_adapters(model):
        assert source.held()[0].live().isfinite().all()
        with pytest.raises(ConfigError, match="a second time"):
            merge_adapters(model)
    with pytest.raises(ConfigError, match="not merged"):
        unmerge_adapters(model)
    merge_adapters(model, keep_base=False)
    with pytest.raises(ConfigError, match="keep_base=True"):
        unmerge_adapters(model)


def test_bf16_sums_are_rounded_once(tiny_models: Path) -> None:
    (chunk,) = model = build(AutoBridge.from_hf_pretrained(tiny_models / "llama3.2"), LoRA(dim=RANK, alpha=RANK))
    linear = chunk.module.decoder.layers[0].mlp.linear_fc2
    with torch.no_grad():
        linear.adapter.linear_out.weight.normal_()
    assert linear.weight.dtype == linear.adapter.linear_out.weight.dtype == torch.bfloat16
    pair = linear.adapter
    update = pair.linear_out.weight.float() @ pair.linear_in.weight.float()
    expected = (linear.weight.float() + update).bfloat16()
    with merged_adapters(model):
        assert torch.equal(linear.weight, expected)
    assert not torch.equal(linear.weight, expected)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 5}, CheckpointMismatch, r"says r=5; take both files of the same adapter"),
        ({"use_dora": True}, CheckpointMismatch, "there is no lora_magnitude_vector"),
        ({"peft_type": "LOHA"}, UnsupportedModel, "peft_type='LOHA', which is not computed here"),
        ({"bias": "all"}, UnsupportedModel, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, r"modules_to_save=\['lm_head'\], which"),
        ({"rank_pattern": {"q_proj": 8}}, CheckpointMismatch, "says r=8 for it in rank_pattern; take both files"),
        ({"rank_pattern": {"q_proj": 0}}, CheckpointMismatch, r"\{'q_proj': 0\} is not above 0"),
        ({"rank_pattern": {"q_proj": None}}, CheckpointMismatch, "is not the configuration of a LoRA adapter"),
        ({"alpha_pattern": {"q_proj(": 8}}, CheckpointMismatch, "is not the configuration of a LoRA adapter"),
        ({"alpha_pattern": ["q_proj"]}, CheckpointMismatch, "is not the configuration of a LoRA adapter"),
        ({"init_lora_weights": "pissa"}, UnsupportedModel, "changes the base model's weights"),
        ({"lora_alpha": None}, CheckpointMismatch, "is not the configuration of a LoRA adapter"),
    ],
)
def test_settings_of_a_folder_are_refused(
    folder: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    change_settings(folder, **settings)
    with pytest.raises(error, match=message):
        read_adapter(folder)


def test_damaged_folders_are_refused(folder: Path) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointMismatch, match="cut short or damaged"):
        read_adapter(folder)
    config.write_text("[")
    with pytest.raises(CheckpointMismatch, match="not the configuration"):
        read_adapter(folder)
    config.unlink()
    with pytest.raises(CheckpointMismatch, match=r"has no adapter_config\.json"):
        read_adapter(folder)


def drop_b(tensors: Tensors) -> None:
    del tensors[f"{PREFIX}.0.self_attn.k_proj.lora_B.weight"]


def add_strange(tensors: Tensors) -> None:
    tensors["base_model.model.lm_head.lora_embedding_A"] = torch.zeros(RANK, 2)


@pytest.mark.parametrize(
    ("change", "message"), [(drop_b, "there is no lora_B.weight"), (add_strange, "is no tensor of a LoRA adapter")]
)
def test_incomplete_and_strange_tensors_are_refused(
    folder: Path, change: Callable[[Tensors], None], message: str
) -> None:
    change_tensors(folder, change)
    with pytest.raises(CheckpointMismatch, match=message):
        read_adapter(folder)


def test_a_folder_of_another_recipe_is_refused(bridge: AutoBridge, folder: Path) -> None:
    for recipe, error, message in (
        (
            LoRA(dim=8, target_modules=["linear_qkv"]),
            ConfigError,
            r"has 4 as rank of \S+_proj.weight, the model's adapters have 8",
        ),
        (LoRA(dim=RANK, alpha=4, target_modules=["linear_qkv"]), ConfigError, r"has 2.0 as scaling of .* have 1.0"),
        (DoRA(dim=RANK, alpha=8), ConfigError, "has False as use_dora"),
        (LoRA(dim=RANK, alpha=8), CheckpointMismatch, "lora_A.weight is not in"),
        (LoRA(dim=RANK, alpha=8, target_modules=["*.layers.0.*qkv"]), CheckpointMismatch, "has no adapter"),
    ):
        with pytest.raises(error, match=message):
            bridge.load_hf_adapter(build(bridge, recipe), folder)


def test_different_ranks_do_not_go_into_one(bridge: AutoBridge, folder: Path) -> None:
    def cut_one(tensors: Tensors) -> None:
        name = f"{PREFIX}.1.self_attn.v_proj.lora"
        tensors |= {f"{name}_A.weight": tensors[f"{name}_A.weight"][:3].clone()}
        tensors |= {f"{name}_B.weight": tensors[f"{name}_B.weight"][:, :3].clone()}

    change_tensors(folder, cut_one)
    change_settings(folder, rank_pattern={"model.layers.1.self_attn.v_proj": 3}, alpha_pattern={"k_proj": 1})
    model = build(bridge, LoRA(dim=RANK, alpha=8, target_modules=["linear_qkv"]))
    with pytest.raises(ConfigError, match=r"has 0.25 as scaling of \S+k_proj.weight, the model's adapters have 2.0"):
        bridge.load_hf_adapter(model, folder)
    model = build(bridge)
    bridge.load_hf_adapter(model, folder)  # chooses by itself
    adapters = [layer.self_attention.linear_qkv.adapter for layer in model[0].decoder.layers]
    # The A's of all are the same, but not what they are multiplied with.
    assert [len(adapters[layer].adapter_v.linear_in.weight) for layer in (0, 1)] == [RANK, 3]
    assert [adapters[1].adapter_k.scaling, adapters[1].adapter_v.scaling] == [0.25, 8 / 3]


def test_different_inputs_do_not_go_into_one(bridge: AutoBridge, folder: Path) -> None:
    name = f"{PREFIX}.0.self_attn.k_proj.lora_A.weight"

    def change_one(tensors: Tensors) -> None:
        tensors[name].add_(1)

    change_tensors(folder, change_one)
    model = build(bridge, LoRA(dim=RANK, alpha=8, target_modules=["linear_qkv"]))
    with pytest.raises(CheckpointMismatch, match=r"k_proj.lora_A.weight .* differs from .*q_proj.* CanonicalLoRA"):
        bridge.load_hf_adapter(model, folder)
    model = build(bridge)
    bridge.load_hf_adapter(model, folder)  # chooses by itself
    pair = model[0].decoder.layers[0].self_attention.linear_qkv.adapter.adapter_k
    assert torch.equal(pair.linear_in.weight, load_file(folder / "adapter_model.safetensors")[name])


def test_another_base_model_is_refused(bridge: AutoBridge, folder: Path, tiny_models: Path, tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        name = f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"
        tensors[name] = torch.cat([tensors[name]] * 2)

    change_tensors(folder, widen)
    with pytest.raises(CheckpointMismatch, match="was trained on another base model"):
        bridge.load_hf_adapter(build(bridge), folder)
    with pytest.raises(CheckpointMismatch, match="take the adapter's own base model"):
        merge_folder(tiny_models / "qwen2", folder, tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists()

    def add_layer(tensors: Tensors) -> None:
        tensors |= {name.replace(".0.", ".9."): tensor.clone() for name, tensor in tensors.items()}

    change_tensors(folder, add_layer)
    with pytest.raises(UnsupportedModel, match="is no linear inside a layer of this model"):
        bridge.load_hf_adapter(build(bridge), folder)
    with pytest.raises(CheckpointMismatch, match="is no tensor of"):
        merge_folder(tiny_models / "qwen2", folder, tmp_path / "out", show_progress=False)


def test_a_folder_of_something_else_is_not_replaced(bridge: AutoBridge, tmp_path: Path) -> None:
    model = build(bridge, LoRA(dim=RANK))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes.txt, which is no part of an adapter"):
        bridge.save_hf_adapter(model, tmp_path)
    bridge.save_hf_adapter(model, tmp_path / "adapter")
    bridge.save_hf_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "notes.txt"]
