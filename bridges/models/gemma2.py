"""Gemma 2: norms before and behind attention and MLP, scaled embeddings, capped scores and logits, alternate windows.

HF stores Gemma's norm weights as gamma - 1 and Megatron's zero-centred norms use them so: the bits are the same.
transformers caps attention scores only in its eager and flash attention; its default (sdpa) leaves the cap out.
"""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    activation,
    bias_fields,
    decoder_fields,
    require_absent,
    rope_fields,
    rope_parameters,
    sliding_window_fields,
)
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Gemma2ForCausalLM` configuration."""
    require_absent(hf, "use_bidirectional_attention", "attention is causal here", (None, False))
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=False)
        | sliding_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | {
            "activation_func": activation(hf, "hidden_activation"),
            "layernorm_zero_centered_gamma": True,
            "post_norms": True,
            "embedding_scale": hf.hidden_size**0.5,
            "softmax_scale": hf.query_pre_attn_scalar**-0.5,
            "attn_logit_softcapping": hf.attn_logit_softcapping,
            "final_logit_softcapping": hf.final_logit_softcapping,
        }
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Gemma2ForCausalLM` configuration."""
    biases = tables.QKV_BIAS + tables.ATTENTION_OUTPUT_BIAS if hf.attention_bias else ()
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + tables.ATTENTION
        + tables.GATED_MLP
        + tables.SANDWICH_NORMS
        + biases
        + tables.output(hf)
    )


GEMMA2 = ModelBridge("gemma2", ("Gemma2ForCausalLM",), rules, translate)
