"""Qwen3-MoE: Qwen3 with experts in all layers, or in those that the configuration does not name as dense."""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    activation,
    bias_fields,
    decoder_fields,
    rope_fields,
    rope_parameters,
    uniform_window_fields,
)
from weightcast.bridges.config_moe import attention_only_bias, expert_fields, softmax_router_fields
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule


def layers_with_experts(hf: PretrainedConfig) -> list[bool]:
    """For each layer whether it has experts, as `Qwen3MoeDecoderLayer` and `Qwen2MoeDecoderLayer` decide it."""
    dense = set(hf.mlp_only_layers or ())
    return [
        layer not in dense and hf.num_experts > 0 and (layer + 1) % hf.decoder_sparse_step == 0
        for layer in range(hf.num_hidden_layers)
    ]


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Qwen3MoeForCausalLM` configuration."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | attention_only_bias(bias_fields(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=False))
        | uniform_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | expert_fields(
            hf,
            num_experts=hf.num_experts,
            ffn_hidden_size=hf.moe_intermediate_size,
            has_experts=layers_with_experts(hf),
        )
        | softmax_router_fields(hf, normalised=hf.norm_topk_prob)
        | {"activation_func": activation(hf), "qk_layernorm": True}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Qwen3MoeForCausalLM` configuration."""
    biases = tables.QKV_BIAS + tables.ATTENTION_OUTPUT_BIAS if hf.attention_bias else ()
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + tables.ATTENTION_NORM
        + tables.ATTENTION
        + tables.QK_NORMS
        + biases
        + tables.dense_or_experts(layers_with_experts(hf), tables.ROUTER + tables.experts(hf.num_experts))
        + tables.output(hf)
    )


QWEN3_MOE = ModelBridge("qwen3_moe", ("Qwen3MoeForCausalLM",), rules, translate)
