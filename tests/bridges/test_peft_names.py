"""Which linears targets select, what recipes refuse, and rules of adapters: pure, without a model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from weightcast.bridges.models.llama import LLAMA
from weightcast.bridges.models.phi3 import PHI3
from weightcast.bridges.peft import CanonicalLoRA, DoRA, LoRA
from weightcast.bridges.peft.factors import PartRows
from weightcast.bridges.peft.load import find_targets
from weightcast.bridges.peft.names import linear_of_key, peft_name, select_parts, split_peft_name
from weightcast.bridges.peft.rules import adapter_rules
from weightcast.bridges.peft.save import target_modules
from weightcast.bridges.peft.settings import UpdateSettings, find_settings, shorten
from weightcast.bridges.rules import FusedQkv, ModelDimensions, Segment
from weightcast.sync.errors import ConfigError, UnmappedTensor
from weightcast.sync.regions import TensorSpec

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.tiny_dense import DENSE_MODELS  # isort: skip
from tests.bridges.tiny_models import tiny_config  # isort: skip

QKV = "decoder.layers.3.self_attention.linear_qkv"


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (("linear_qkv",), ()),
        (("*.layers.3.*.linear_qkv",), ()),
        (("*linear_qkv",), ()),
        ((QKV,), ()),
        (("linear_v", "linear_q"), ("adapter_q", "adapter_v")),
        (("*.layers.3.*.linear_k",), ("adapter_k",)),
        (("*.layers.2.*.linear_qkv", "linear_proj", "qkv", "linear_qk"), None),
    ],
)
def test_targets_select(targets: tuple[str, ...], parts: tuple[str, ...] | None) -> None:
    assert select_parts(QKV, targets) == parts


def test_a_linear_is_adapted_as_a_whole_or_in_parts() -> None:
    with pytest.raises(ConfigError, match="as a whole and in parts"):
        select_parts(QKV, ("linear_q", "*.linear_qkv"))


@pytest.mark.parametrize(
    ("key", "linear"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1"),
        ("decoder.layers.1.mlp.experts.experts.linear_fc2.weight", "decoder.layers.1.mlp.experts.linear_fc2"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", None),
        ("decoder.layers.0.mlp.linear_fc2.post_layernorm.weight", None),
        ("decoder.layers.0.mlp.linear_fc1.bias", None),
        ("embedding.word_embeddings.weight", None),
        ("decoder.layers.0.mlp.router.weight", None),
    ],
)
def test_linears_are_found_by_their_keys(key: str, linear: str | None) -> None:
    assert linear_of_key(key) == linear


def test_names_of_peft_go_both_ways() -> None:
    name = peft_name("model.layers.0.self_attn.q_proj.weight", "lora_A.weight")
    assert name == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert split_peft_name(name) == ("model.layers.0.self_attn.q_proj.weight", "lora_A.weight")
    assert split_peft_name("base_model.model.lm_head.lora_embedding_A") is None
    assert split_peft_name("model.layers.0.self_attn.q_proj.lora_A.weight") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim must be at least 1"),
        ({"dropout": 1.0}, "below 1"),
        ({"dropout_position": "middle"}, "'pre' and 'post'"),
        ({"lora_A_init_method": "ones"}, "'kaiming'"),
        ({"lora_B_init_method": "xavier"}, "start as no change"),
        ({"target_modules": []}, "is empty"),
        ({"rank_pattern": {"linear_proj": 0}}, "ranks must be at least 1"),
        ({"alpha_pattern": {"linear_k": 8}}, "target 'linear_qkv' instead of 'linear_k', or use CanonicalLoRA"),
        ({"target_modules": ["linear_q"]}, "target 'linear_qkv' instead of 'linear_q', or use CanonicalLoRA"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)  # type: ignore[arg-type]


def test_dora_drops_inputs_only() -> None:
    with pytest.raises(ConfigError, match="drops inputs only"):
        DoRA(dropout_position="post")


def test_scaling_is_that_of_peft() -> None:
    assert LoRA(dim=16, alpha=32).scaling == 2
    assert LoRA(dim=16, alpha=32, use_rslora=True).scaling == 8


RANKS = {"*.layers.3.*.linear_q": 2, "linear_qkv": 5, "linear_v": 7}


@pytest.mark.parametrize(
    ("linear", "part", "rank"),
    [
        (QKV, "adapter_q", 2),
        (QKV, "adapter_k", 5),
        (QKV, "adapter_v", 5),  # the first that fits
        (QKV.replace("3", "2"), "adapter_q", 5),
        (QKV, "", 5),
        ("decoder.layers.3.self_attention.linear_proj", "", 16),
    ],
)
def test_the_first_pattern_that_fits_says_the_rank(linear: str, part: str, rank: int) -> None:
    recipe = CanonicalLoRA(dim=16, alpha=32, rank_pattern=RANKS, alpha_pattern={"linear_q": 8})
    settings = recipe.settings_of(linear, part)
    assert (settings.rank, settings.alpha) == (rank, 8 if part == "adapter_q" else 32)
    assert settings.scaling == settings.alpha / settings.rank


@given(
    ranks=st.dictionaries(
        st.sampled_from(
            ["q_proj", r"layers\.[02]\..*_proj", "self_attn.k_proj", "layers.1.mlp.up_proj", "proj", "k_proj"]
        ),
        st.integers(1, 9),
    )
)
def test_patterns_of_a_folder_mean_what_they_mean_to_peft(ranks: dict[str, int]) -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    modules = [f"model.layers.{layer}.{name}" for layer in (0, 1, 11) for name in names]
    found = find_settings(UpdateSettings(4, 8, False), ranks, {}, [f"{module}.weight" for module in modules])
    for module in modules:
        assert found[f"{module}.weight"].rank == ranks.get(get_pattern_key(list(ranks), module), 4)


@given(st.dictionaries(st.sampled_from([f"layers.{n}.{name}" for n in range(12) for name in "qkv"]), st.integers(1, 3)))
def test_shortened_patterns_give_every_value_again(values: dict[str, int]) -> None:
    pattern = shorten(values, default=2)
    assert 2 not in pattern.values()
    found = find_settings(UpdateSettings(2, 8, False), pattern, {}, values)
    assert {name: settings.rank for name, settings in found.items()} == values
    for last_name in "qkv":
        own = {value for name, value in values.items() if name.endswith(last_name)}
        assert (last_name in pattern) == (len(own) == 1 and own != {2})


def test_excluded_linears_are_left_alone() -> None:
    recipe = LoRA(target_modules=["linear_qkv", "linear_proj"], exclude_modules=["*.layers.3.*"])
    assert recipe.parts_of(QKV) is None
    assert recipe.parts_of(QKV.replace("3", "2")) == ()


@given(groups=st.integers(1, 4), per_group=st.integers(1, 3), head_dim=st.integers(1, 4))
def test_rows_of_parts_lie_where_the_rule_of_the_weight_says(groups: int, per_group: int, head_dim: int) -> None:
    dimensions = ModelDimensions(1, groups * per_group, groups, head_dim, 0)
    num_rows = groups * (per_group + 2) * head_dim
    segments = FusedQkv("qkv", q="q", k="k", v="v").segments((num_rows,), dimensions)
    rows = PartRows.make(("q", "k", "v"), segments)
    assert sorted(rows.order) == list(range(num_rows))
    names = [name for name, size in rows.num_rows.items() for _ in range(size)]
    by_part = {name: 0 for name in rows.num_rows}
    where = {}
    for place, name in enumerate(names):
        where[place] = (name, by_part[name])
        by_part[name] += 1
    for segment in segments:
        for row in range(segment.num_rows):
            assert where[rows.order[segment.megatron_row + row]] == (segment.hf, segment.hf_row + row)


def test_rules_of_a_fused_adapter_repeat_a_and_split_b_as_the_weight() -> None:
    config = tiny_config("llama2")
    recipe = LoRA(dim=4, target_modules=["*.layers.1.*.linear_qkv"])
    rule_in, rule_out = adapter_rules(LLAMA.rules(config), 4, recipe)
    dimensions = ModelDimensions(4, 4, 4, 8, 131)
    prefix = "base_model.model.model.layers.1.self_attn"
    assert rule_in.megatron == "decoder.layers.1.self_attention.linear_qkv.adapter.linear_in.weight"
    assert rule_in.segments((4, 32), dimensions) == tuple(
        Segment(f"{prefix}.{name}_proj.lora_A.weight", 0, 0, 4) for name in "qkv"
    )
    weight = FusedQkv("w", *(f"{prefix}.{name}_proj.lora_B.weight" for name in "qkv"))
    assert rule_out.segments((96, 4), dimensions) == weight.segments((96, 32), dimensions)


def test_parts_of_what_is_one_tensor_in_hf_have_no_names_in_peft() -> None:
    config = DENSE_MODELS["phi4"]()
    with pytest.raises(UnmappedTensor, match=r"qkv_proj.* target the fused linear as a whole"):
        adapter_rules(PHI3.rules(config), 4, CanonicalLoRA(target_modules=["linear_q"]))


def test_targets_of_a_folder_are_short_where_all_linears_of_a_name_are_alike() -> None:
    names = {f"layers.{layer}.{name}": () for layer in range(2) for name in ("linear_qkv", "linear_proj")}
    selection: dict[str, tuple[str, ...] | None] = dict(names) | {"layers.1.linear_proj": None}
    assert find_targets(selection) == ("linear_qkv", "layers.0.linear_proj")
    selection |= {f"layers.{layer}.linear_qkv": ("adapter_q", "adapter_v") for layer in range(2)}
    assert find_targets(selection) == ("linear_q", "linear_v", "layers.0.linear_proj")


def test_target_modules_are_whole_names_where_a_last_name_is_too_wide() -> None:
    base = [f"model.layers.{layer}.self_attn.{name}.weight" for layer in range(2) for name in ("q_proj", "o_proj")]
    specs = [TensorSpec(peft_name(name, "lora_A.weight"), torch.float32, (2, 2)) for name in base]
    assert target_modules(specs, base) == ["o_proj", "q_proj"]
    assert target_modules(specs[:1], base) == ["model.layers.0.self_attn.q_proj"]
