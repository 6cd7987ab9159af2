"""GLM-4.5 and GLM-4.6: dense layers first, then experts with a sigmoid router and a shared one; a rope on half a head.

Published checkpoints hold a further layer for multi-token prediction.
"""

from transformers import PretrainedConfig

from weightcast.bridges.config import activation, bias_fields, decoder_fields, rope_fields, rope_parameters
from weightcast.bridges.config_moe import expert_fields, shared_expert_fields, sigmoid_router_fields
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.models.prediction import num_prediction_layers, prediction_layers
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule


def _layers_with_experts(hf: PretrainedConfig) -> list[bool]:
    return [layer >= hf.first_k_dense_replace for layer in range(hf.num_hidden_layers)]


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Glm4MoeForCausalLM` configuration."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=hf.attention_bias, attention_output=False, mlp=False)
        | rope_fields(hf, rope_parameters(hf), partial=True)
        | expert_fields(
            hf,
            num_experts=hf.n_routed_experts,
            ffn_hidden_size=hf.moe_intermediate_size,
            has_experts=_layers_with_experts(hf),
        )
        | shared_expert_fields(hf.moe_intermediate_size * hf.n_shared_experts)
        | sigmoid_router_fields(hf)
        | {
            "activation_func": activation(hf),
            "qk_layernorm": hf.use_qk_norm,
            "mtp_num_layers": num_prediction_layers(hf) or None,
        }
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Glm4MoeForCausalLM` configuration."""
    sparse = tables.ROUTER + tables.ROUTER_BIAS + tables.experts(hf.n_routed_experts) + tables.shared_experts()
    attention = (
        tables.ATTENTION_NORM
        + tables.ATTENTION
        + (tables.QKV_BIAS if hf.attention_bias else ())
        + (tables.QK_NORMS if hf.use_qk_norm else ())
    )
    has_experts = _layers_with_experts(hf)
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + attention
        + tables.dense_or_experts(has_experts, sparse)
        + tables.output(hf)
        + prediction_layers(hf, attention + tables.mlp(has_experts[-1], sparse))
    )


GLM4_MOE = ModelBridge("glm4_moe", ("Glm4MoeForCausalLM",), rules, translate, prediction_layers=True)
