"""Qwen3, dense: norms on queries and keys, a head dimension of its own."""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    activation,
    bias_fields,
    decoder_fields,
    rope_fields,
    rope_parameters,
    sliding_window_fields,
)
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Qwen3ForCausalLM` configuration."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=False)
        | sliding_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | {"activation_func": activation(hf), "qk_layernorm": True}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Qwen3ForCausalLM` configuration."""
    biases = tables.QKV_BIAS + tables.ATTENTION_OUTPUT_BIAS if hf.attention_bias else ()
    return tables.DENSE_DECODER + tables.QK_NORMS + biases + tables.output(hf)


QWEN3 = ModelBridge("qwen3", ("Qwen3ForCausalLM",), rules, translate)
