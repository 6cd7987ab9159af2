"""Which tensors are quantised, under which names, and what the engine is told."""

import json

import pytest
import torch

from weightcast.sync.errors import ConfigError
from weightcast.sync.quantize_rules import Fp8Scheme, kept_by_config, matches, plan_fp8
from weightcast.sync.regions import TensorSpec

BF16 = torch.bfloat16
LAYER = "model.layers.0"
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (1000, 200),
    f"{LAYER}.input_layernorm.weight": (200,),
    f"{LAYER}.self_attn.q_proj.weight": (256, 200),
    f"{LAYER}.self_attn.q_proj.bias": (256,),
    f"{LAYER}.self_attn.k_proj.weight": (128, 200),
    f"{LAYER}.self_attn.v_proj.weight": (128, 200),
    f"{LAYER}.self_attn.o_proj.weight": (200, 256),
    f"{LAYER}.mlp.gate.weight": (4, 200),
    f"{LAYER}.mlp.experts.0.gate_proj.weight": (130, 200),
    f"{LAYER}.mlp.experts.0.up_proj.weight": (130, 200),
    f"{LAYER}.mlp.experts.0.down_proj.weight": (200, 130),
    "lm_head.weight": (1000, 200),
}
LINEARS = [name for name in SHAPES if "_proj.weight" in name]


def specs(**more: tuple[int, ...]) -> list[TensorSpec]:
    """The model above, and more tensors."""
    return [TensorSpec(name, BF16, shape) for name, shape in (SHAPES | more).items()]


@pytest.mark.parametrize(
    ("kind", "form", "suffix", "shape"),
    [
        ("fp8_block", "fp8", "_scale_inv", (2, 2)),
        ("fp8_block", "compressed-tensors", "_scale", (2, 2)),
        ("fp8_tensor", "fp8", "_scale", ()),
        ("fp8_tensor", "compressed-tensors", "_scale", ()),
    ],
)
def test_linears_are_codes_with_scales_behind_them(kind: str, form: str, suffix: str, shape: tuple[int, ...]) -> None:
    plan = plan_fp8(specs(), Fp8Scheme(kind=kind, format=form))
    assert list(plan.quantized) == LINEARS
    published = {spec.name: spec for spec in plan.specs}
    assert list(published) == [n for name in SHAPES for n in ([name, name + suffix] if name in LINEARS else [name])]
    name = f"{LAYER}.mlp.experts.0.gate_proj.weight"
    assert published[name] == TensorSpec(name, torch.float8_e4m3fn, (130, 200))
    assert published[name + suffix] == TensorSpec(name + suffix, torch.float32, shape)
    for kept in set(SHAPES) - set(LINEARS):
        assert published[kept] == TensorSpec(kept, BF16, SHAPES[kept])


def test_one_scale_serves_what_engines_fuse() -> None:
    blocks = plan_fp8(specs(), Fp8Scheme(kind="fp8_block")).quantized
    assert all(tensor.group == name for name, tensor in blocks.items())
    groups: dict[str, list[str]] = {}
    for name, tensor in plan_fp8(specs(), Fp8Scheme(kind="fp8_tensor")).quantized.items():
        groups.setdefault(tensor.group, []).append(name.split(".")[-2])
    assert list(groups.values()) == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_modules_can_be_kept() -> None:
    plan = plan_fp8(specs(), Fp8Scheme(kind="fp8_block", keep=("self_attn", "*experts.*.down_proj")))
    assert [name.split(".")[-2] for name in plan.quantized] == ["gate_proj", "up_proj"]
    assert plan.kept_modules == (
        "model.embed_tokens",
        *(f"{LAYER}.self_attn.{word}_proj" for word in "qkvo"),
        f"{LAYER}.mlp.gate",
        f"{LAYER}.mlp.experts.0.down_proj",
        "lm_head",
    )


def test_stacked_experts_and_strange_linears_are_quantised_on_request() -> None:
    stacked, strange = {"m.mlp.experts.down_proj": (6, 200, 130)}, {"m.conv.weight": (256, 130)}
    also = ("mlp.experts.down_proj", "m.conv")
    plan = plan_fp8(specs(**stacked, **strange), Fp8Scheme(kind="fp8_block", also=also))
    assert plan.quantized["m.mlp.experts.down_proj"].scales.shape == (6, 2, 2)
    assert plan.quantized["m.conv.weight"].scales.shape == (2, 2)
    plan = plan_fp8(specs(**stacked, **strange), Fp8Scheme(kind="fp8_tensor", also=also))
    assert plan.quantized["m.mlp.experts.down_proj"].scales.shape == (6,)


# Matrices of every family that a bridge covers, by what their files call them in layer 0.
FAMILIES = {
    "self_attn.": "q_proj k_proj v_proj o_proj qkv_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
    "mlp.": "gate_proj up_proj down_proj gate_up_proj",
    "mlp.experts.3.": "gate_proj up_proj down_proj",
    "mlp.shared_expert.": "gate_proj up_proj down_proj",
    "mlp.shared_experts.": "gate_proj up_proj down_proj",
    "block_sparse_moe.experts.3.": "w1 w2 w3",
}
FAMILIES_KEPT = (
    *("model.embed_tokens", "lm_head", f"{LAYER}.mlp.gate", f"{LAYER}.mlp.router", f"{LAYER}.block_sparse_moe.gate"),
    *(f"{LAYER}.mlp.shared_expert_gate", f"{LAYER}.eh_proj", f"{LAYER}.shared_head.head", f"{LAYER}.embed_tokens"),
    *("visual.blocks.0.attn.qkv", "visual.blocks.0.mlp.gate_proj", "visual.merger.mlp.0", "visual.patch_embed.proj"),
)


def test_every_family_is_known() -> None:
    linears = [f"{LAYER}.{prefix}{word}.weight" for prefix, words in FAMILIES.items() for word in words.split()]
    kept = [f"{name}.weight" for name in FAMILIES_KEPT]
    plan = plan_fp8([TensorSpec(name, BF16, (256, 256)) for name in [*linears, *kept]], Fp8Scheme(kind="fp8_block"))
    assert list(plan.quantized) == linears
    assert plan.kept_modules == FAMILIES_KEPT


@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        ({"m.conv.weight": (4, 4)}, {}, r"m.conv.weight \(4, 4\).*`keep`.*`also`"),
        ({"m.experts.gate_up_proj": (2, 4, 4)}, {}, r"m.experts.gate_up_proj \(2, 4, 4\)"),
        ({}, {"keep": ("self_atn",)}, "keep: 'self_atn' is part of no tensor's name"),
        ({}, {"also": ("x.*",)}, "also: 'x.\\*' is part of no"),
        ({}, {"keep": ("k_proj",)}, r"k_proj.weight would be kept and .*q_proj.weight.*v_proj.weight quantised"),
    ],
)
def test_what_no_rule_fits_is_refused_by_name(
    more: dict[str, tuple[int, ...]], settings: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_fp8(specs(**more), Fp8Scheme(kind="fp8_block", **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["kind", "format", "division"])
def test_unknown_settings_are_refused_with_those_that_are_known(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}='int3' is not one of"):
        Fp8Scheme(**({"kind": "fp8_block"} | {setting: "int3"}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.1.mlp.gate.weight", "mlp.gate", True),
        ("model.layers.1.mlp.gate_proj.weight", "mlp.gate", False),
        ("model.layers.11.mlp.gate.weight", "model.layers.1", False),
        ("model.layers.11.mlp.gate.weight", "model.layers.1*", True),
        ("lm_head.weight", "lm_head", True),
        ("lm_head.weight", "*head", True),
        ("lm_head.weight", "head", False),
    ],
)
def test_patterns_are_whole_words_or_have_a_star(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_what_a_checkpoint_left_alone_can_be_left_alone_again() -> None:
    listed = {"modules_to_not_convert": ["lm_head", f"{LAYER}.self_attn.o_proj", "some.older.name"]}
    assert kept_by_config(listed, specs()) == ("lm_head", f"{LAYER}.self_attn.o_proj")
    assert kept_by_config({}, specs()) == ()
    with pytest.raises(ConfigError, match=r"weight_block_size \[64, 64\]"):
        kept_by_config({"weight_block_size": [64, 64]}, specs())
    with pytest.raises(ConfigError, match=r"'re:\.\*lm_head'"):
        kept_by_config({"ignore": ["re:.*lm_head"]}, specs())


def test_the_engine_is_told_blocks_activations_and_what_is_left_alone() -> None:
    kept = ["model.embed_tokens", f"{LAYER}.mlp.gate", "lm_head"]
    config = plan_fp8(specs(), Fp8Scheme(kind="fp8_block")).engine_config()
    assert (
        config
        == json.loads(json.dumps(config))
        == {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": kept,
            }
        }
    )
    tensor = plan_fp8(specs(), Fp8Scheme(kind="fp8_tensor")).engine_config()["quantization_config"]
    assert "weight_block_size" not in tensor and tensor["activation_scheme"] == "dynamic"
    other = plan_fp8(specs(), Fp8Scheme(kind="fp8_block", format="compressed-tensors")).engine_config()
    assert other["quantization_config"]["ignore"] == kept
