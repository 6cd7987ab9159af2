"""Llama 2, 3, 3.1, 3.2 and 3.3, and models of the same architecture."""

from transformers import PretrainedConfig

from weightcast.bridges.config import activation, bias_fields, decoder_fields, rope_fields, rope_parameters
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `LlamaForCausalLM` configuration."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=hf.mlp_bias)
        | rope_fields(hf, rope_parameters(hf))
        | {"activation_func": activation(hf)}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `LlamaForCausalLM` configuration."""
    attention_biases = tables.QKV_BIAS + tables.ATTENTION_OUTPUT_BIAS if hf.attention_bias else ()
    mlp_biases = tables.GATED_MLP_BIAS if hf.mlp_bias else ()
    return tables.DENSE_DECODER + attention_biases + mlp_biases + tables.output(hf)


LLAMA = ModelBridge("llama", ("LlamaForCausalLM",), rules, translate)
