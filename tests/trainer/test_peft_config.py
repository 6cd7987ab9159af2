"""The section `peft`: what is refused before any process group is made, each with the remedy."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from weightcast.bridges import GPTModelProvider
from weightcast.bridges.peft import CanonicalLoRA, DoRA, LoRA
from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks import check_config
from weightcast.trainer.overrides import load_config, save_config
from weightcast.trainer.peft.method import RecipeMethod
from weightcast.trainer.peft.prepare import freeze_settings
from weightcast.trainer.peft.schemes import default_targets, make_method


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["peft.scheme=canonical-lora"], "did you mean 'canonical_lora'? there are lora, canonical_lora, dora"),
        (
            ["peft.scheme=lora", "peft.dropout=1"],
            "peft.dropout=1.0 is a probability; it must be at least 0 and below 1",
        ),
        (["peft.scheme=lora", "peft.dropout=-0.1"], "peft.dropout=-0.1"),
        (["peft.scheme=lora", "peft.dim=0"], "peft.dim=0"),
        (["peft.scheme=dora", "peft.dropout_position=post"], "DoRA drops inputs only"),
        (["peft.scheme=lora", "peft.dropout_position=mid"], "is not one of: pre, post"),
        (["peft.scheme=lora", "peft.lora_A_init_method=ones"], "is not one of: xavier, kaiming, zero"),
        (["peft.dim=8"], "peft.dim is set and peft.scheme is not, so all weights would train"),
        (["publish.peft=adapter"], "publish.peft=adapter needs adapters"),
        (["publish.peft=both"], "is not one of: merged, adapter"),
        (
            ["peft.scheme=lora", "publish.peft=adapter", "publish.quantize=fp8_block", "publish.to=ipc:///x"],
            "set publish.peft=merged",
        ),
        (["peft.scheme=lora", "publish.peft=adapter"], "publish.peft is set and publish.to is not"),
        (["peft.scheme=lora", "peft.options={x: 1}"], "peft.options is for a scheme of your own"),
        (["peft.scheme=mine:make", "peft.export_adapter=out"], "peft.export_adapter needs LoRA or DoRA"),
    ],
)
def test_wrong_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(words), world_size=1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["peft.scheme=lora", "peft.target_modules=[linear_q]"], "target 'linear_qkv' instead of 'linear_q'"),
        (["peft.scheme=no.such.module:make"], "cannot be imported"),
        (["peft.scheme=json:make"], "cannot be imported"),
    ],
)
def test_a_scheme_refuses_what_does_not_fit_it(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_method(load_config(words).peft)
    assert message in str(caught.value)


def test_settings_reach_the_recipe() -> None:
    words = [
        *("peft.scheme=dora", "peft.dim=8", "peft.target_modules=[linear_qkv, linear_fc1]", "peft.use_rslora=true"),
        *("peft.exclude_modules=['*.layers.0.*']", "peft.rank_pattern={linear_fc1: 4}", "peft.dropout=0.1"),
        "peft.lora_A_init_method=kaiming",
    ]
    config = load_config(words)
    check_config(config, world_size=1)
    method = make_method(config.peft)
    assert isinstance(method, RecipeMethod)
    assert method.recipe == DoRA(
        dim=8,
        target_modules=("linear_qkv", "linear_fc1"),
        exclude_modules=("*.layers.0.*",),
        rank_pattern={"linear_fc1": 4},
        use_rslora=True,
        dropout=0.1,
        lora_A_init_method="kaiming",
    )
    assert method.recipe.alpha == 64


@pytest.mark.parametrize(("scheme", "kind"), [("lora", LoRA), ("canonical_lora", CanonicalLoRA), ("dora", DoRA)])
def test_defaults_are_those_of_the_recipes(scheme: str, kind: type[LoRA]) -> None:
    method = make_method(load_config([f"peft.scheme={scheme}"]).peft)
    assert isinstance(method, RecipeMethod) and method.recipe == kind()


def test_the_section_is_saved_and_read_again(tmp_path: Path) -> None:
    config = load_config(["peft.scheme=lora", "peft.alpha_pattern={'*.layers.1.*.linear_proj': 8}"])
    save_config(config, tmp_path / "run.yaml")
    assert load_config(config_file=str(tmp_path / "run.yaml")) == config


@pytest.mark.parametrize("words", [[], ["peft.scheme=lora"], ["peft.load_adapter=a/folder"]])
def test_a_frozen_router_stands_still_and_experts_stay_grouped(words: list[str]) -> None:
    provider = GPTModelProvider(
        num_layers=3,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_grouped_gemm=True,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.5,
    )
    freeze_settings(load_config(words), provider)
    assert provider.moe_grouped_gemm
    assert provider.moe_router_bias_update_rate == (0.0 if words else 0.5)


def test_default_targets_of_latent_attention() -> None:
    latent = SimpleNamespace(multi_latent_attention=True, q_lora_rank=None)
    common = ("linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
    assert default_targets(LoRA, latent) == ("linear_q_proj", *common, "linear_fc1", "linear_fc2")
    latent.q_lora_rank = 24
    query = ("linear_q_down_proj", "linear_q_up_proj")
    assert default_targets(CanonicalLoRA, latent) == (
        *(*query, *common),
        *("linear_fc1_up", "linear_fc1_gate", "linear_fc2"),
    )
