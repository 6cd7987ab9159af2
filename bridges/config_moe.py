"""From the fields of an HF configuration with experts to those of a provider.

HF's routers differ in the order of softmax and choice, in what they normalise, and in how they choose among groups of
experts; Megatron's router has a switch for some of it and computes something else for the rest, which is refused.
"""

from collections.abc import Sequence

from transformers import PretrainedConfig

from weightcast.bridges.config_refusals import Fields, refuse


def expert_fields(
    hf: PretrainedConfig, *, num_experts: int, ffn_hidden_size: int, has_experts: Sequence[bool]
) -> Fields:
    """Number and size of the experts, the layers that have them, and how tokens travel to them.

    The router computes in fp32 whatever the dtype of the model. The auxiliary loss has HF's coefficient; Megatron adds
    it to the gradients while it trains, and never to outputs.
    """
    if not any(has_experts):
        refuse(hf, "num_experts", num_experts, "no layer has experts", "use the architecture of the dense model")
    return {
        "num_moe_experts": num_experts,
        "moe_ffn_hidden_size": ffn_hidden_size,
        "moe_layer_freq": [int(flag) for flag in has_experts],
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": float(getattr(hf, "router_aux_loss_coef", None) or 0.0),
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }


def shared_expert_fields(size: int, *, gated: bool = False) -> Fields:
    """Experts that see every token, `size` rows in all; `gated` weighs them by a sigmoid of the token."""
    return {"moe_shared_expert_intermediate_size": size, "moe_shared_expert_gate": gated} if size else {}


def attention_only_bias(fields: Fields) -> Fields:
    """`fields` of `bias_fields` for a model with experts.

    Megatron's `add_bias_linear` would also give the router a bias and is refused by shared experts; what has a bias
    here is named one by one.
    """
    return fields | {"add_bias_linear": False}


def softmax_router_fields(hf: PretrainedConfig, *, normalised: bool) -> Fields:
    """Softmax over all experts, then the choice; `normalised` weights of the chosen ones add up to 1.

    A softmax over the chosen experts alone gives the same normalised weights, so that Megatron's `pre_softmax` is
    their absence.
    """
    if normalised and hf.num_experts_per_tok == 1:
        refuse(hf, "num_experts_per_tok", 1, "Megatron does not normalise the weight of a single expert", "use 2")
    return {"moe_router_score_function": "softmax", "moe_router_pre_softmax": not normalised}


def sigmoid_router_fields(hf: PretrainedConfig) -> Fields:
    """DeepSeek V3's router, which GLM-4.5 has too: sigmoid scores, a bias for the choice alone, groups of experts.

    HF scores a group by its two best experts, Megatron by its topk / group_topk best
    (megatron/core/transformer/moe/moe_utils.py, `group_limited_topk`).
    """
    topk, groups, chosen_groups = hf.num_experts_per_tok, hf.n_group, hf.topk_group
    if bool(hf.norm_topk_prob) != (topk > 1):
        why = "Megatron normalises the weights of several chosen experts, and never that of one"
        refuse(hf, "norm_topk_prob", hf.norm_topk_prob, why, f"it must be {topk > 1} for {topk} experts a token")
    fields: Fields = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": float(hf.routed_scaling_factor),
    }
    if groups is not None and groups > 1:
        if topk // chosen_groups != 2:
            why = f"Megatron would score groups by their {topk // chosen_groups} best experts, HF does by two"
            refuse(hf, "topk_group", chosen_groups, why, "use a model with half as many groups as experts a token")
        fields |= {"moe_router_num_groups": groups, "moe_router_group_topk": chosen_groups}
    return fields
