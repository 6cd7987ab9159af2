"""Mixtral: Mistral with experts in every layer, under names of its own (w1 is the gate, w3 up, w2 down)."""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    activation,
    bias_fields,
    decoder_fields,
    rope_fields,
    rope_parameters,
    uniform_window_fields,
)
from weightcast.bridges.config_moe import expert_fields, softmax_router_fields
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rename, Rule

_SPARSE = f"{tables.HF_LAYER}block_sparse_moe."


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `MixtralForCausalLM` configuration."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=False, attention_output=False, mlp=False)
        | uniform_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | expert_fields(
            hf,
            num_experts=hf.num_local_experts,
            ffn_hidden_size=hf.intermediate_size,
            has_experts=[True] * hf.num_hidden_layers,
        )
        | softmax_router_fields(hf, normalised=True)
        | {"activation_func": activation(hf), "moe_input_jitter_eps": hf.router_jitter_noise or None}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `MixtralForCausalLM` configuration."""
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + tables.ATTENTION_NORM
        + tables.ATTENTION
        + tables.PRE_MLP_NORM
        + (Rename(f"{tables.MEGATRON_LAYER}mlp.router.weight", f"{_SPARSE}gate.weight"),)
        + tables.experts(hf.num_local_experts, hf=_SPARSE, names=("w1", "w3", "w2"))
        + tables.output(hf)
    )


MIXTRAL = ModelBridge("mixtral", ("MixtralForCausalLM",), rules, translate)
