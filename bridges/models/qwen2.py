"""Qwen2 and Qwen2.5, dense."""

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
    """The provider for a `Qwen2ForCausalLM` configuration, which leaves the biases of q, k and v unsaid."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=True, attention_output=False, mlp=False)
        | sliding_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | {"activation_func": activation(hf)}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Qwen2ForCausalLM` configuration."""
    return tables.DENSE_DECODER + tables.QKV_BIAS + tables.output(hf)


QWEN2 = ModelBridge("qwen2", ("Qwen2ForCausalLM",), rules, translate)
