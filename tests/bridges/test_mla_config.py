"""Translation of DeepSeek configurations, the rope of latent attention, and the choice of experts among groups."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, PretrainedConfig

from weightcast.bridges import AutoBridge
from weightcast.bridges.layers.mla_router import choose_experts
from weightcast.bridges.provider_mla import MLAModelProvider
from weightcast.bridges.rules import expand_rules
from weightcast.sync.errors import ConfigError, UnsupportedModel

# config.json of the real models, without what no bridge reads; in the spelling in which each was published.
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2: dict[str, Any] = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT: dict[str, Any] = V3 | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
KIMI_K2: dict[str, Any] = V3 | {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "factor": 32.0},
    "rope_theta": 50000,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


def config_of(fields: dict[str, Any]) -> PretrainedConfig:
    kind = DeepseekV2Config if fields["architectures"] == ["DeepseekV2ForCausalLM"] else DeepseekV3Config
    return kind.from_dict(dict(fields))


def provider_of(fields: dict[str, Any]) -> MLAModelProvider:
    provider = AutoBridge.from_hf_config(config_of(fields)).to_megatron_provider(load_weights=False)
    assert isinstance(provider, MLAModelProvider)
    return provider


EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v2-lite": (
        V2_LITE,
        {
            "num_layers": 27,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_head_dim": 128,
            "qk_pos_emb_head_dim": 64,
            "v_head_dim": 128,
            "moe_layer_freq": [0] + [1] * 26,
            "moe_shared_expert_intermediate_size": 2816,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": True,
            "moe_router_num_groups": None,
            "moe_router_enable_expert_bias": False,
            "moe_aux_loss_coeff": 0.001,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "rope_type": "yarn",
            "rotary_scaling_factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    ),
    "v2": (
        V2,
        {
            "q_lora_rank": 1536,
            "moe_router_num_groups": 8,
            "moe_router_group_topk": 3,
            "moe_router_group_score_experts": 1,
            "moe_router_topk_scaling_factor": 16.0,
        },
    ),
    "v3": (
        V3,
        {
            "moe_layer_freq": [0] * 3 + [1] * 58,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 8,
            "moe_router_group_topk": 4,
            "moe_router_group_score_experts": None,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_dtype": "fp32",
            "original_max_position_embeddings": 4096,
        },
    ),
    "moonlight": (
        MOONLIGHT,
        {
            "q_lora_rank": None,
            "layernorm_epsilon": 1e-5,
            "latent_layernorm_epsilon": 1e-6,
            "rope_type": "rope",
            "rotary_base": 50000.0,
            "rotary_scaling_factor": 1.0,
            "mscale_all_dim": 1.0,
            "moe_router_num_groups": None,
        },
    ),
    "kimi-k2": (KIMI_K2, {"num_moe_experts": 384, "beta_fast": 1.0, "rotary_scaling_factor": 32.0}),
}


@pytest.mark.parametrize("model", EXPECTED)
def test_providers_of_the_published_models(model: str) -> None:
    fields, expected = EXPECTED[model]
    provider = provider_of(fields)
    assert {name: getattr(provider, name) for name in expected} == expected
    assert provider.multi_latent_attention and provider.qk_layernorm


@pytest.mark.parametrize(
    ("model", "changes", "named"),
    [
        (V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func"),
        (V2, {"attention_bias": True}, "attention_bias"),
        (V2, {"mlp_bias": True}, "mlp_bias"),
        (V2, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V2, {"num_key_value_heads": 64}, "num_key_value_heads"),
        (V3, {"rope_interleave": False}, "rope_interleave"),
        (V3, {"topk_group": 2}, "topk_group"),
        (V3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        (V3, {"rope_scaling": V3["rope_scaling"] | {"mscale": 0}}, "mscale_all_dim"),
        (V3, {"rope_scaling": V3["rope_scaling"] | {"attention_factor": 1.5}}, "attention_factor"),
        (V3, {"rope_scaling": V3["rope_scaling"] | {"truncate": False}}, "truncate"),
    ],
)
def test_what_megatron_would_compute_differently_is_refused(
    model: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        provider_of(model | changes)


@pytest.mark.parametrize("rank", ["kv_lora_rank", "q_lora_rank"])
def test_latents_must_divide_by_tensor_parallelism(rank: str) -> None:
    provider = provider_of(V3 | {rank: 1537})
    provider.tensor_model_parallel_size = 2
    with pytest.raises(ConfigError, match=rank):
        provider.finalize()


def test_the_rope_must_be_one_of_latent_attention() -> None:
    provider = provider_of(V3)
    provider.rope_type = "llama3"
    with pytest.raises(ConfigError, match="rope_type"):
        provider.finalize()


def test_mla_transformer_config_is_the_provider() -> None:
    config = AutoBridge.from_hf_config(config_of(V2_LITE)).mla_transformer_config
    assert (config.kv_lora_rank, config.multi_latent_attention, config.num_moe_experts) == (512, True, 64)


def test_a_model_without_latent_attention_has_no_mla_config() -> None:
    bridge = AutoBridge.from_hf_config(LlamaConfig(architectures=["LlamaForCausalLM"]))
    with pytest.raises(ConfigError, match="transformer_config"):
        _ = bridge.mla_transformer_config


@pytest.mark.parametrize("fields", [V2_LITE, V2, V3, MOONLIGHT, KIMI_K2])
def test_the_tables_fill_every_tensor_of_the_published_models(fields: dict[str, Any]) -> None:
    bridge = AutoBridge.from_hf_config(config_of(fields))
    table = expand_rules(bridge.family.rules(bridge.hf_config), fields["num_hidden_layers"])
    filled = sorted(name for rule in table.values() for name in rule.hf_names)
    assert filled == sorted(spec.name for spec in bridge.hf_specs())


@pytest.mark.parametrize("best", [1, 2])
def test_groups_are_scored_by_their_best_experts(best: int) -> None:
    """Against a search by hand; the right groups differ between the two ways of scoring."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(64, 12, generator=generator)
    values, experts = choose_experts(scores, topk=4, num_groups=4, group_topk=2, best=best)
    for token in range(len(scores)):
        groups = scores[token].view(4, 3)
        totals = [float(group.sort(descending=True).values[:best].sum()) for group in groups]
        kept = sorted(range(4), key=lambda group: totals[group], reverse=True)[:2]
        allowed = [group * 3 + place for group in kept for place in range(3)]
        wanted = sorted(allowed, key=lambda expert: float(scores[token, expert]), reverse=True)[:4]
        assert experts[token].tolist() == wanted
        assert torch.equal(values[token], scores[token, wanted])


def test_the_two_ways_of_scoring_choose_differently() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.6]])
    by_best = choose_experts(scores, topk=2, num_groups=2, group_topk=1, best=1)[1]
    by_two = choose_experts(scores, topk=2, num_groups=2, group_topk=1, best=2)[1]
    assert by_best.tolist() == [[0, 1]] and by_two.tolist() == [[3, 2]]


@pytest.mark.parametrize("blocks", [None, [64, 64]])
def test_other_quantised_weights_than_fp8_in_blocks_of_128_are_refused(blocks: list[int] | None) -> None:
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    assert provider_of(V3 | {"quantization_config": fp8}).num_layers == 61
    with pytest.raises(UnsupportedModel, match="quantization_config"):
        provider_of(V3 | {"quantization_config": fp8 | {"weight_block_size": blocks}})
