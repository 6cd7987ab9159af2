"""Translation of HF configurations: what a provider says of real models, and what is refused by name."""

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from weightcast.bridges.config import gelu_tanh
from weightcast.bridges.layers.rope import Rope
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.models.registry import BUILT_IN, find_bridge, supported_architectures
from weightcast.bridges.rules import Tied, Vocab
from weightcast.sync.errors import UnsupportedModel

CLASSES: dict[str, type[PretrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "Gemma3ForCausalLM": Gemma3TextConfig,
}

# config.json of the real models, without what no bridge reads; in the spelling in which each was published.
LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN_25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
GEMMA3_4B_TEXT: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 256,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 8,
    "num_hidden_layers": 34,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}


def hf_config(fields: dict[str, Any], **changes: Any) -> PretrainedConfig:
    """The configuration as transformers reads it from config.json."""
    return CLASSES[fields["architectures"][0]].from_dict(copy.deepcopy(fields | changes))


def provider(fields: dict[str, Any], **changes: Any) -> Any:
    hf = hf_config(fields, **changes)
    return find_bridge(hf).translate(hf)


def test_llama_31() -> None:
    p = provider(LLAMA_31_8B)
    assert (p.num_layers, p.hidden_size, p.ffn_hidden_size) == (32, 4096, 14336)
    assert (p.num_attention_heads, p.num_query_groups, p.kv_channels) == (32, 8, 128)
    assert (p.vocab_size, p.seq_length, p.layernorm_epsilon) == (128256, 131072, 1e-5)
    assert p.rope() == Rope(500000.0, 1.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert (p.params_dtype, p.bf16, p.fp16) == (torch.bfloat16, True, False)
    assert (p.add_bias_linear, p.qkv_bias, p.mlp_bias) == (False, False, False)
    assert not p.share_embeddings_and_output_weights and not p.qk_layernorm and p.window_size is None
    assert p.activation_func is torch.nn.functional.silu and p.gated_linear_unit


def test_qwen25_has_biases_on_qkv_alone_and_no_window_unless_it_is_used() -> None:
    p = provider(QWEN_25_05B)
    assert (p.add_bias_linear, p.add_qkv_bias, p.attention_output_bias, p.mlp_bias) == (False, True, False, False)
    assert p.window_size is None and p.kv_channels == 64
    assert p.rope() == Rope(1000000.0) and p.local_rope() is None
    windowed = provider(QWEN_25_05B, use_sliding_window=True, sliding_window=4096)
    assert windowed.window_size == (4095, 0)
    assert windowed.window_attn_skip_freq == [0] * 21 + [1] * 3


def test_qwen3() -> None:
    p = provider(QWEN3_06B)
    assert p.kv_channels == 128 and p.qk_layernorm and p.share_embeddings_and_output_weights
    assert not p.qkv_bias and not p.layernorm_zero_centered_gamma


def test_gemma3_alternates_windows_and_ropes() -> None:
    p = provider(GEMMA3_4B_TEXT)
    assert p.rope() == Rope(1000000.0, 1.0, "linear", 8.0)
    assert p.local_rope() == Rope(10000.0)
    assert p.window_size == (1023, 0)
    assert p.window_attn_skip_freq == [0 if layer % 6 == 5 else 1 for layer in range(34)]
    assert p.layernorm_zero_centered_gamma and p.post_norms and p.qk_layernorm
    assert p.activation_func is gelu_tanh
    assert p.embedding_scale == 2560**0.5 and p.softmax_scale == 256**-0.5
    assert p.share_embeddings_and_output_weights


def test_rope_settings_of_configurations_older_than_transformers_5() -> None:
    hf = hf_config(LLAMA_31_8B)
    new = find_bridge(hf).translate(hf).rope()
    del hf.rope_parameters
    hf.rope_theta = 500000.0
    hf.rope_scaling = {**LLAMA_31_8B["rope_scaling"], "type": "llama3"}
    assert find_bridge(hf).translate(hf).rope() == new
    hf.rope_scaling = {"type": "linear", "factor": 2.0}
    assert find_bridge(hf).translate(hf).rope() == Rope(500000.0, 1.0, "linear", 2.0)


@pytest.mark.parametrize(
    "dtype, expected", [("float16", torch.float16), ("float32", torch.float32), (None, torch.float32)]
)
def test_the_dtype_is_that_of_the_checkpoint(dtype: str | None, expected: torch.dtype) -> None:
    p = provider(QWEN3_06B, torch_dtype=dtype)
    assert (p.params_dtype, p.fp16, p.bf16) == (expected, expected is torch.float16, False)


NTK = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3_PLUS = {**LLAMA_31_8B["rope_scaling"], "attention_factor": 1.2}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another rope": (QWEN3_06B, {"rope_scaling": NTK}, r"rope_parameters.rope_type='dynamic'.*'llama3'.*'yarn'"),
    "another number": (LLAMA_31_8B, {"rope_scaling": LLAMA3_PLUS}, r"attention_factor=1.2.*remove it"),
    "partial rotation": (LLAMA_31_8B, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5.*1.0"),
    "activation": (LLAMA_31_8B, {"hidden_act": "relu2"}, r"hidden_act='relu2'.*'silu'"),
    "attention cap": (GEMMA3_4B_TEXT, {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0.*None"),
    "logit cap": (GEMMA3_4B_TEXT, {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0.*None"),
    "both ways": (GEMMA3_4B_TEXT, {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True.*False"),
    "quantised": (QWEN3_06B, {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config.*fp8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_megatron_would_compute_differently_is_refused(case: str) -> None:
    fields, changes, message = REFUSED[case]
    with pytest.raises(UnsupportedModel, match=message) as refusal:
        provider(fields, **changes)
    assert str(refusal.value).startswith(f"{fields['architectures'][0]}: ")


@pytest.mark.parametrize("kinds", [["chunked_attention"] * 28, ["full_attention"]])
def test_layers_of_unknown_kinds_or_number_are_refused(kinds: list[str]) -> None:
    hf = hf_config(QWEN3_06B)
    hf.layer_types = kinds  # past the checks of transformers' own constructor
    with pytest.raises(UnsupportedModel, match=r"layer_types=.*each of the 28 layers"):
        find_bridge(hf).translate(hf)


def test_a_scaled_rope_on_sliding_layers_is_refused() -> None:
    hf = hf_config(GEMMA3_4B_TEXT)
    hf.rope_parameters["sliding_attention"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match=r"sliding_attention.rope_type='linear'"):
        find_bridge(hf).translate(hf)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    hf = PretrainedConfig(architectures=["MambaForCausalLM"])
    with pytest.raises(
        UnsupportedModel, match=r"MambaForCausalLM.*Gemma3ForCausalLM.*LlamaForCausalLM.*Qwen2ForCausalLM"
    ):
        find_bridge(hf)
    with pytest.raises(UnsupportedModel, match="none named"):
        find_bridge(PretrainedConfig())


def test_a_family_of_ones_own_is_found_first() -> None:
    llama = BUILT_IN[0]
    mine = ModelBridge("mine", ("MineForCausalLM", "LlamaForCausalLM"), llama.rules, llama.translate)
    assert find_bridge(PretrainedConfig(architectures=["MineForCausalLM"]), (mine, *BUILT_IN)) is mine
    assert find_bridge(hf_config(LLAMA_31_8B), (mine, *BUILT_IN)) is mine
    assert "MineForCausalLM" in supported_architectures((mine, *BUILT_IN))
    assert "MineForCausalLM" not in supported_architectures()


@pytest.mark.parametrize("fields", [LLAMA_31_8B, QWEN_25_05B, QWEN3_06B, GEMMA3_4B_TEXT])
@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_is_a_rule_of_its_own_or_an_alias(fields: dict[str, Any], tied: bool) -> None:
    hf = hf_config(fields, tie_word_embeddings=tied)
    rules = {rule.megatron: rule for rule in find_bridge(hf).rules(hf)}
    assert isinstance(rules["output_layer.weight"], Tied if tied else Vocab)


def test_biases_add_rules() -> None:
    def keys(**changes: Any) -> set[str]:
        hf = hf_config(LLAMA_31_8B, **changes)
        return {rule.megatron.removeprefix("decoder.layers.{layer}.") for rule in find_bridge(hf).rules(hf)}

    plain = keys()
    assert keys(attention_bias=True) - plain == {"self_attention.linear_qkv.bias", "self_attention.linear_proj.bias"}
    assert keys(mlp_bias=True) - plain == {"mlp.linear_fc1.bias", "mlp.linear_fc2.bias"}
