"""DeepSeek V2-Lite, V2, V3 and R1, and models of their architecture: Moonlight, Kimi K2.

Latent attention, a few dense layers, then layers with experts and shared experts. V2 chooses experts by softmax among
groups scored by their best expert, V3 by sigmoid with a bias for the choice among groups scored by their two best.
"""

from collections.abc import Callable

from transformers import PretrainedConfig

from weightcast.bridges.config import Fields, activation
from weightcast.bridges.config_mla import latent_attention_fields
from weightcast.bridges.config_moe import (
    expert_fields,
    shared_expert_fields,
    sigmoid_router_fields,
    softmax_router_fields,
)
from weightcast.bridges.config_refusals import refuse, require_absent
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.models.deepseek_tables import latent_attention
from weightcast.bridges.models.prediction import num_prediction_layers, prediction_layers
from weightcast.bridges.provider_mla import MLAModelProvider
from weightcast.bridges.rules import Rule


def _has_experts(hf: PretrainedConfig) -> list[bool]:
    """For each layer whether it has experts: all but the first `first_k_dense_replace`."""
    return [layer >= hf.first_k_dense_replace for layer in range(hf.num_hidden_layers)]


def _expert_fields(hf: PretrainedConfig) -> Fields:
    """What V2 and V3 have in common; nothing where every layer is dense."""
    require_absent(hf, "moe_layer_freq", "every layer behind the dense ones has experts here", (None, 1))
    if not any(_has_experts(hf)):
        return {}
    fields = expert_fields(
        hf,
        num_experts=hf.n_routed_experts,
        ffn_hidden_size=hf.moe_intermediate_size,
        has_experts=_has_experts(hf),
    )
    fields |= shared_expert_fields(hf.moe_intermediate_size * (hf.n_shared_experts or 0))
    return fields | {
        "moe_router_load_balancing_type": "seq_aux_loss" if getattr(hf, "seq_aux", True) else "aux_loss",
        "moe_aux_loss_coeff": float(getattr(hf, "aux_loss_alpha", None) or 0.0),
    }


def _v2_router_fields(hf: PretrainedConfig) -> Fields:
    require_absent(hf, "scoring_func", "DeepSeek V2 scores experts by softmax", (None, "softmax"))
    require_absent(hf, "norm_topk_prob", "transformers' DeepSeek V2 never normalises the weights", (None, False))
    fields = softmax_router_fields(hf, normalised=False) | {
        "moe_router_topk_scaling_factor": float(hf.routed_scaling_factor)
    }
    if hf.topk_method == "greedy":
        return fields
    if hf.topk_method != "group_limited_greedy":
        why = "DeepSeek V2 chooses experts by greedy or group_limited_greedy"
        refuse(hf, "topk_method", hf.topk_method, why, "use one of them")
    return fields | {
        "moe_router_num_groups": hf.n_group,
        "moe_router_group_topk": hf.topk_group,
        "moe_router_group_score_experts": 1,
    }


def _v3_router_fields(hf: PretrainedConfig) -> Fields:
    require_absent(hf, "scoring_func", "DeepSeek V3 scores experts by sigmoid", (None, "sigmoid"))
    require_absent(hf, "topk_method", "DeepSeek V3 has no other way to choose experts", (None, "noaux_tc"))
    return sigmoid_router_fields(hf)


def _translator(router_fields: Callable[[PretrainedConfig], Fields]) -> Callable[[PretrainedConfig], MLAModelProvider]:
    def translate(hf: PretrainedConfig) -> MLAModelProvider:
        """The provider for a DeepSeek configuration."""
        require_absent(hf, "mlp_bias", "Megatron's experts have no biases here", (None, False))
        experts = _expert_fields(hf)
        return MLAModelProvider(
            **latent_attention_fields(hf)
            | experts
            | (router_fields(hf) if experts else {})
            | {"activation_func": activation(hf), "mtp_num_layers": num_prediction_layers(hf) or None}
        )

    return translate


def _rules(hf: PretrainedConfig, router: tuple[Rule, ...]) -> tuple[Rule, ...]:
    shared = tables.shared_experts() if hf.n_shared_experts else ()
    sparse = router + tables.experts(hf.n_routed_experts) + shared
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + latent_attention(hf)
        + tables.dense_or_experts(_has_experts(hf), sparse)
        + tables.output(hf)
        + prediction_layers(hf, latent_attention(hf) + tables.mlp(_has_experts(hf)[-1], sparse))
    )


def v2_rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `DeepseekV2ForCausalLM` configuration."""
    return _rules(hf, tables.ROUTER)


def v3_rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `DeepseekV3ForCausalLM` configuration."""
    return _rules(hf, tables.ROUTER + tables.ROUTER_BIAS)


DEEPSEEK_V2 = ModelBridge("deepseek-v2", ("DeepseekV2ForCausalLM",), v2_rules, _translator(_v2_router_fields))
# Kimi K2's configuration names this class, and has V3's fields under a type of its own (`hf_config.SAME_FIELDS`).
DEEPSEEK_V3 = ModelBridge(
    "deepseek-v3", ("DeepseekV3ForCausalLM",), v3_rules, _translator(_v3_router_fields), prediction_layers=True
)
