"""Mistral, Gemma 2, Phi-3, GLM and long-context ropes: the logits of transformers, the bits of the file, refusals.

One job of two gloo processes goes through every model and layout; its figures are read case by case.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bridges.no_collectives import no_collectives
from tests.bridges.test_bits import build, check_export, check_regions, import_one
from tests.ranks import run_ranks
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from weightcast.bridges import AutoBridge
from weightcast.bridges.layers.explicit_attention import explicit_attention
from weightcast.bridges.layers.rope import LongRope, Yarn
from weightcast.bridges.models.registry import find_bridge
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.bridges.rules import ModelDimensions, Segment
from weightcast.bridges.rules_concat import ConcatQkv
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import UnmappedTensor, UnsupportedModel

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.parity_job import largest_difference, largest_gradient_difference  # isort: skip
from tests.bridges.parity_models import DEFAULT_ROPE  # isort: skip
from tests.bridges.tiny_dense import DENSE_MODELS, LONGROPE, PHI, YARN, write_dense_model  # isort: skip

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient

LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
GRADIENTS = ("gemma2", "phi3-long", "glm4")

# A change of the provider under which parity must fail, or the test sees nothing: model and setting.
SABOTAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "window one longer": ("mistral-window", {"window_size": (6, 0)}),
    "scores not capped": ("gemma2", {"attn_logit_softcapping": None}),
    "logits not capped": ("gemma2", {"final_logit_softcapping": None}),
    "windows on all layers": ("gemma2", {"window_attn_skip_freq": None}),
    "no longrope": ("phi3-long", {"rope_extension": None}),
    "no window": ("phi3-long", {"window_size": None}),
    "no yarn": ("llama-yarn", {"rope_extension": None}),
    "pairs far apart": ("glm4", {"rotary_interleaved": False}),
    "the whole head rotated": ("glm4", {"rotary_percent": 1.0}),
}


def compare_all(out: str) -> dict[str, dict[str, float]]:
    """Largest differences of logits and gradients by layout and model; bits are checked on the way."""
    differences: dict[str, dict[str, float]] = {}
    for layout, sizes in LAYOUTS.items():
        differences[layout] = {}
        for name in DENSE_MODELS:
            differences[layout][name] = largest_difference(Path(out, name), sizes)
            check_bits(Path(out, name, "model"), sizes)
        destroy_model_parallel()
    gradient_of = largest_gradient_difference
    differences["gradients"] = {name: gradient_of(Path(out, name), LAYOUTS["tp2"]) for name in GRADIENTS}
    destroy_model_parallel()
    differences["sabotage"] = {
        change: largest_difference(Path(out, name), settings) for change, (name, settings) in SABOTAGE.items()
    }
    return differences


def check_bits(folder: Path, layout: dict[str, int]) -> None:
    """Import without a collective into a model full of NaN, then export: the file's bits both times."""
    bridge, checkpoint = AutoBridge.from_hf_pretrained(folder), open_checkpoint(folder)
    model = build(bridge, layout)
    with no_collectives():
        import_one(bridge, model, checkpoint)
        check_regions(list(bridge.weight_source(model).held()), checkpoint)
    check_export(bridge, model, checkpoint)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    out = tmp_path_factory.mktemp("dense")
    for name in DENSE_MODELS:
        write_dense_model(name, out / name)
    first, second = run_ranks(compare_all, 2, str(out), env={"CUDA_VISIBLE_DEVICES": ""})
    assert first == second
    result: dict[str, dict[str, float]] = first
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", DENSE_MODELS)
def test_logits_are_those_of_transformers_and_bits_those_of_the_file(
    differences: dict[str, dict[str, float]], model: str, layout: str
) -> None:
    assert differences[layout][model] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model", GRADIENTS)
def test_gradients_are_those_of_transformers(differences: dict[str, dict[str, float]], model: str) -> None:
    assert differences["gradients"][model] <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("change", SABOTAGE)
def test_a_wrong_setting_shows(differences: dict[str, dict[str, float]], change: str) -> None:
    assert differences["sabotage"][change] > 100 * TOLERANCE


def translated(hf: PretrainedConfig, architecture: str) -> Any:
    """The provider for a configuration as transformers reads it from config.json."""
    hf.architectures = [architecture]
    return find_bridge(hf).translate(hf)


def test_capped_attention_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 5, 8, generator=generator) * 4
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    found = explicit_attention(query, key, value, mask, scale=0.5, cap=3.0)
    for head in range(4):
        scores = torch.einsum("bsk,btk->bst", query[:, head], key[:, head // 2]) * 0.5
        weights = (3.0 * (scores / 3.0).tanh()).masked_fill(~mask, float("-inf")).softmax(-1)
        torch.testing.assert_close(found[:, head], weights @ value[:, head // 2])


DIMENSIONS = ModelDimensions(num_layers=1, num_attention_heads=4, num_query_groups=2, head_dim=3, vocab_size=0)


def test_concatenated_projections_are_interleaved_by_query_group() -> None:
    rule = ConcatQkv("layers.{layer}.qkv", "model.{layer}.qkv_proj").at_layer(7)
    assert (rule.megatron, rule.hf_names) == ("layers.7.qkv", ("model.7.qkv_proj",))
    found = rule.segments((24, 5), DIMENSIONS)
    hf = "model.7.qkv_proj"  # rows 0 to 11 are queries, 12 to 17 keys, 18 to 23 values
    assert found == (
        *(Segment(hf, 0, 0, 6), Segment(hf, 6, 12, 3), Segment(hf, 9, 18, 3)),
        *(Segment(hf, 12, 6, 6), Segment(hf, 18, 15, 3), Segment(hf, 21, 21, 3)),
    )
    with pytest.raises(UnmappedTensor, match=r"layers.7.qkv has 23 rows"):
        rule.segments((23, 5), DIMENSIONS)


# What each real model's config.json says beyond sizes, as published, and what a provider makes of it.
PHI4_MINI = {
    **{"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32},
    **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75},
    **{"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}},
    **{"sliding_window": 262144, "tie_word_embeddings": True},
}


def test_published_configurations() -> None:
    mistral = translated(MistralConfig.from_dict({"sliding_window": 4096, "head_dim": 128}), "MistralForCausalLM")
    assert (mistral.window_size, mistral.window_attn_skip_freq, mistral.kv_channels) == ((4095, 0), None, 128)
    assert translated(MistralConfig.from_dict({"sliding_window": None}), "MistralForCausalLM").window_size is None
    gemma = translated(Gemma2Config(), "Gemma2ForCausalLM")
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping, gemma.softmax_scale) == (50.0, 30.0, 0.0625)
    assert (gemma.window_size, gemma.window_attn_skip_freq) == ((4095, 0), [1, 0] * 13)
    assert gemma.layernorm_zero_centered_gamma and gemma.post_norms and gemma.embedding_scale == 48.0
    phi = translated(Phi3Config.from_dict(PHI4_MINI), "Phi3ForCausalLM")
    assert (phi.rotary_percent, phi.window_size) == (0.75, (262143, 0))
    assert phi.rope_extension == LongRope((1.0,) * 48, (1.5,) * 48, 4096, math.sqrt(1 + math.log(32) / math.log(4096)))
    glm = translated(Glm4Config(), "Glm4ForCausalLM")
    assert (glm.rotary_percent, glm.rotary_interleaved, glm.post_norms) == (0.5, True, True)
    assert (glm.qkv_bias, glm.attention_output_bias, glm.kv_channels) == (True, False, 128)
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    qwen = translated(Qwen2Config.from_dict({"rope_scaling": yarn}), "Qwen2ForCausalLM")
    assert qwen.rope_extension == Yarn(4.0, 32768, attention_factor=0.1 * math.log(4.0) + 1.0)


REFUSED: dict[str, tuple[str, PretrainedConfig, dict[str, Any], str]] = {
    "dropout": ("Phi3ForCausalLM", Phi3Config(**PHI), {"resid_pdrop": 0.1}, r"resid_pdrop=0.1.*embeddings"),
    "window": ("MistralForCausalLM", MistralConfig(), {"sliding_window": 0}, r"sliding_window=0.*null"),
    "kinds of layers": (
        *("MistralForCausalLM", MistralConfig(sliding_window=None), {"layer_types": ["sliding_attention"]}),
        r"layer_types='sliding_attention'.*Ministral",
    ),
    "both ways": (
        *("Gemma2ForCausalLM", Gemma2Config(), {"use_bidirectional_attention": True}),
        r"use_bidirectional_attention=True.*False",
    ),
    "yarn of some layers only": (
        *("Gemma3ForCausalLM", Gemma3TextConfig()),
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT_ROPE}},
        r"full_attention.rope_type='yarn'.*linear",
    ),
    "too few factors": (
        *("Phi3ForCausalLM", Phi3Config(**PHI), {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}),
        r"long_factor=\[1.0\].*must hold 6 numbers",
    ),
    "a share": (
        *("Glm4ForCausalLM", Glm4Config(), {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}),
        r"partial_rotary_factor=1.5.*\(0, 1\]",
    ),
    "a share where transformers ignores it": (
        *("LlamaForCausalLM", LlamaConfig(), {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}),
        r"partial_rotary_factor=0.5.*1.0",
    ),
    "no original length": (
        *("LlamaForCausalLM", LlamaConfig(), {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        r"original_max_position_embeddings=None.*yarn needs it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_megatron_would_compute_differently_is_refused(case: str) -> None:
    architecture, hf, changes, message = REFUSED[case]
    for name, value in changes.items():
        setattr(hf, name, value)  # past the checks of transformers' own constructor
    with pytest.raises(UnsupportedModel, match=message) as refusal:
        translated(hf, architecture)
    assert str(refusal.value).startswith(f"{architecture}: ")
