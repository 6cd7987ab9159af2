"""Gemma 3, text: norms before and behind attention and MLP, scaled embeddings, windows with a rope of their own.

HF stores Gemma's norm weights as gamma - 1 and Megatron's zero-centred norms use them so: the bits are the same.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    Fields,
    activation,
    bias_fields,
    decoder_fields,
    refuse,
    require_absent,
    rope_fields,
    rope_parameters,
    sliding_window_fields,
)
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule


def _rope_by_kind(hf: PretrainedConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Rope parameters of the full and of the sliding layers; before transformers 5 they were fields of their own."""
    parameters = rope_parameters(hf)
    if "full_attention" in parameters:
        return parameters["full_attention"], parameters["sliding_attention"]
    return parameters, {"rope_type": "default", "rope_theta": getattr(hf, "rope_local_base_freq", 10000.0)}


def _both_ropes(hf: PretrainedConfig) -> Fields:
    full, sliding = _rope_by_kind(hf)
    local = rope_fields(hf, sliding)
    scaled = sorted(local.keys() - {"rotary_base"})
    if scaled:
        kind = sliding.get("rope_type")
        refuse(hf, "rope_parameters.sliding_attention.rope_type", kind, "only full layers scale their rope", "unset it")
    both = rope_fields(hf, full)
    if "rope_extension" in both:
        kind, why = full.get("rope_type"), "Megatron would scale the cosines of sliding layers with it"
        refuse(hf, "rope_parameters.full_attention.rope_type", kind, why, "use one of default, linear, llama3")
    return both | {"rotary_base_local": local["rotary_base"]}


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Gemma3ForCausalLM` configuration."""
    require_absent(hf, "attn_logit_softcapping", "attention scores are not capped here")
    require_absent(hf, "final_logit_softcapping", "logits are not capped here")
    require_absent(hf, "use_bidirectional_attention", "attention is causal here", (None, False))
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=False)
        | sliding_window_fields(hf)
        | _both_ropes(hf)
        | {
            "activation_func": activation(hf, "hidden_activation"),
            "qk_layernorm": True,
            "layernorm_zero_centered_gamma": True,
            "post_norms": True,
            "embedding_scale": hf.hidden_size**0.5,
            "softmax_scale": hf.query_pre_attn_scalar**-0.5,
        }
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Gemma3ForCausalLM` configuration."""
    biases = tables.QKV_BIAS + tables.ATTENTION_OUTPUT_BIAS if hf.attention_bias else ()
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + tables.ATTENTION
        + tables.QK_NORMS
        + tables.GATED_MLP
        + tables.SANDWICH_NORMS
        + biases
        + tables.output(hf)
    )


GEMMA3 = ModelBridge("gemma3", ("Gemma3ForCausalLM",), rules, translate)
