"""Mistral: Llama's decoder, in some versions with a sliding window on every layer."""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    activation,
    bias_fields,
    decoder_fields,
    refuse,
    rope_fields,
    rope_parameters,
    uniform_window_fields,
)
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `MistralForCausalLM` configuration."""
    kind = "full_attention" if getattr(hf, "sliding_window", None) is None else "sliding_attention"
    for other in set(getattr(hf, "layer_types", None) or ()) - {kind}:
        why = "transformers' Mistral treats all layers alike, by sliding_window"
        refuse(hf, "layer_types", other, why, "remove layer_types, or use the architecture Ministral")
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=False, attention_output=False, mlp=False)
        | uniform_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | {"activation_func": activation(hf)}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `MistralForCausalLM` configuration."""
    return tables.DENSE_DECODER + tables.output(hf)


MISTRAL = ModelBridge("mistral", ("MistralForCausalLM",), rules, translate)
