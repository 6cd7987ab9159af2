"""The models and layouts of the parity job: every feature that moves logits, in every way a model is cut.

Sizes and numbers are picked against accidents; `parity_job.py` runs all of it and `test_parity.py` names the cases.
"""

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

# The head dimension is not hidden size / heads, the vocabulary is odd, windows are shorter than the sequence, and the
# weights are large enough that every feature moves the logits by far more than the tolerance.
COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 800.0, "factor": 3.0}
# None of Llama 3's four numbers is the one that Megatron hard-codes, and each band has frequencies of the small head.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 5.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
GEMMA3: dict[str, Any] = COMMON | {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": LINEAR_ROPE,
        "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
    },
}

MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**COMMON | {"num_key_value_heads": 4}, rope_parameters=DEFAULT_ROPE),
    "llama3-tied-one-kv-head": lambda: LlamaConfig(
        **COMMON | {"num_key_value_heads": 1, "tie_word_embeddings": True}, head_dim=16, rope_parameters=LLAMA3_ROPE
    ),
    "llama-linear-rope-all-biases": lambda: LlamaConfig(
        **COMMON, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR_ROPE
    ),
    "llama-attention-biases": lambda: LlamaConfig(**COMMON, attention_bias=True, rope_parameters=DEFAULT_ROPE),
    "llama-mlp-biases": lambda: LlamaConfig(**COMMON, mlp_bias=True, rope_parameters=DEFAULT_ROPE),
    "qwen2-one-kv-head": lambda: Qwen2Config(**COMMON | {"num_key_value_heads": 1}, rope_parameters=DEFAULT_ROPE),
    "qwen2-tied-windows": lambda: Qwen2Config(
        **COMMON | WINDOWS | {"tie_word_embeddings": True}, rope_parameters=DEFAULT_ROPE
    ),
    "qwen3-biases-windows": lambda: Qwen3Config(
        **COMMON | WINDOWS, head_dim=16, attention_bias=True, rope_parameters=LINEAR_ROPE
    ),
    "qwen3-tied-one-kv-head": lambda: Qwen3Config(
        **COMMON | {"num_key_value_heads": 1, "tie_word_embeddings": True}, head_dim=16, rope_parameters=DEFAULT_ROPE
    ),
    "gemma3-tied-one-kv-head": lambda: Gemma3TextConfig(
        **GEMMA3 | {"num_key_value_heads": 1, "tie_word_embeddings": True}
    ),
    "gemma3-biases": lambda: Gemma3TextConfig(**GEMMA3, attention_bias=True),
}

MOE: dict[str, Any] = COMMON | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

MOE_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3-moe-biases-one-dense-layer": lambda: Qwen3MoeConfig(
        **MOE,
        head_dim=16,
        num_experts=4,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        attention_bias=True,
        rope_parameters=LINEAR_ROPE,
    ),
    "qwen3-moe-tied-unnormalised": lambda: Qwen3MoeConfig(
        **MOE | {"tie_word_embeddings": True}, num_experts=8, norm_topk_prob=False, rope_parameters=DEFAULT_ROPE
    ),
    "mixtral-window": lambda: MixtralConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, rope_parameters=DEFAULT_ROPE
    ),
    "qwen2-moe-gated-shared-expert": lambda: Qwen2MoeConfig(
        **MOE, num_experts=4, shared_expert_intermediate_size=40, rope_parameters=DEFAULT_ROPE
    ),
    "glm4-moe-groups": lambda: Glm4MoeConfig(
        **MOE | {"num_experts_per_tok": 4},
        head_dim=16,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        attention_bias=True,
        rope_parameters=DEFAULT_ROPE | {"partial_rotary_factor": 0.5},
    ),
}

# The long matrix (`layout_tables`) has every cut by itself as well; here are those that combine them.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2-sequence-parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"tensor_model_parallel_size": 4},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "cp4": {"context_parallel_size": 4},
    "cp2-tp2-sequence-parallel": {
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}

GRADIENT_LAYOUTS = ("tp2-sequence-parallel", "tp4", "pp2-vpp2", "tp2-pp2", "cp2-tp2-sequence-parallel")

# Without an expert tensor parallel size the experts are split like the rest of the model.
MOE_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2-sequence-parallel-etp1": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
    },
    "ep4": {"expert_model_parallel_size": 4},
    "ep2-pp2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "ep2-tp2-etp1": {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
    },
    "ep2-tp2-etp2": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}

MOE_GRADIENT_LAYOUTS = ("ep2-pp2", "ep2-tp2-etp1", "ep2-tp2-etp2")

# A change of the provider under which parity must fail, or the test sees nothing: model and setting.
SABOTAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "rope-numbers-of-megatron": (
        "llama3-tied-one-kv-head",
        {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_max_position_embeddings": 8192},
    ),
    "no-linear-scaling": ("llama-linear-rope-all-biases", {"seq_len_interpolation_factor": None}),
    "window-one-longer": ("qwen2-tied-windows", {"window_size": (6, 0)}),
    "one-rope-for-all-layers": ("gemma3-biases", {"rotary_base_local": None}),
    "plain-softmax-scale": ("gemma3-biases", {"softmax_scale": None}),
    "unscaled-embeddings": ("gemma3-biases", {"embedding_scale": None}),
    "weights-of-experts-as-they-are": ("qwen3-moe-biases-one-dense-layer", {"moe_router_pre_softmax": True}),
    "weights-of-experts-normalised": ("qwen3-moe-tied-unnormalised", {"moe_router_pre_softmax": False}),
    "unscaled-experts": ("glm4-moe-groups", {"moe_router_topk_scaling_factor": None}),
    "no-groups-of-experts": ("glm4-moe-groups", {"moe_router_num_groups": None, "moe_router_group_topk": None}),
}
