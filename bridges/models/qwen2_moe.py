"""Qwen2-MoE and Qwen1.5-MoE: experts, and a shared expert that each token weighs by a gate of its own."""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    activation,
    bias_fields,
    decoder_fields,
    rope_fields,
    rope_parameters,
    sliding_window_fields,
)
from weightcast.bridges.config_moe import expert_fields, shared_expert_fields, softmax_router_fields
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.models.qwen3_moe import layers_with_experts
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rename, Rule

SHARED_EXPERT_GATE: tuple[Rule, ...] = (
    Rename(
        f"{tables.MEGATRON_LAYER}mlp.shared_experts.gate_weight",
        f"{tables.HF_LAYER}mlp.shared_expert_gate.weight",
    ),
)


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Qwen2MoeForCausalLM` configuration."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=hf.qkv_bias, attention_output=False, mlp=False)
        | sliding_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | expert_fields(
            hf,
            num_experts=hf.num_experts,
            ffn_hidden_size=hf.moe_intermediate_size,
            has_experts=layers_with_experts(hf),
        )
        | shared_expert_fields(hf.shared_expert_intermediate_size, gated=True)
        | softmax_router_fields(hf, normalised=hf.norm_topk_prob)
        | {"activation_func": activation(hf)}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Qwen2MoeForCausalLM` configuration."""
    sparse = (
        tables.ROUTER + tables.experts(hf.num_experts) + tables.shared_experts("shared_expert") + SHARED_EXPERT_GATE
    )
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + tables.ATTENTION_NORM
        + tables.ATTENTION
        + (tables.QKV_BIAS if hf.qkv_bias else ())
        + tables.dense_or_experts(layers_with_experts(hf), sparse)
        + tables.output(hf)
    )


QWEN2_MOE = ModelBridge("qwen2_moe", ("Qwen2MoeForCausalLM",), rules, translate)
