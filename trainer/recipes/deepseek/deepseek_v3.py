"""DeepSeek-V3: pretraining, fine-tuning of all weights, and LoRA or DoRA.

The published weights are FP8 with scales; training is in bf16, so that the configuration leaves
`quantization_config` out. The layer for multi-token prediction is trained as well,
but not adapted.

    import weightcast.trainer.recipes.deepseek.deepseek_v3 as deepseek_v3

    cfg = deepseek_v3.pretrain_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, MixedPrecisionConfig, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/deepseek-ai/DeepSeek-V3, for what the model is."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
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
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }


def pretrain_config() -> ConfigContainer:
    """Pretraining, on 1024 GPUs (TP2 PP16 EP64) or a multiple; 4096 sequences of 4096 tokens a step."""
    cfg = pretrain_defaults()
    cfg.model = ModelConfig(
        hf_config=hf_config(),
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=16,
        pipeline_model_parallel_layout="Et*4|(t*4|)*14tmL",
        expert_model_parallel_size=64,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        recompute_granularity="selective",
        recompute_modules=["mla_up_proj", "layernorm"],
        mtp_num_layers=1,
        mtp_loss_scaling_factor=0.1,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        moe_router_bias_update_rate=0.001,
    )
    cfg.train.train_iters = 1_000_000
    cfg.train.global_batch_size = 4096
    cfg.train.micro_batch_size = 1
    cfg.scheduler.lr_warmup_iters = 2000
    cfg.scheduler.lr_decay_iters = cfg.train.train_iters
    cfg.mixed_precision = MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False)
    return cfg


def sft_config() -> ConfigContainer:
    """Fine-tuning of all weights, on 1024 GPUs (TP2 PP16 EP64) or a multiple; 128 samples of 2048 tokens a step."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="deepseek-ai/DeepSeek-V3",
        hf_config=hf_config(),
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=16,
        pipeline_model_parallel_layout="Et*4|(t*4|)*14tmL",
        expert_model_parallel_size=64,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        recompute_granularity="selective",
        recompute_modules=["mla_up_proj", "layernorm"],
        mtp_num_layers=1,
        mtp_loss_scaling_factor=0.1,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        moe_router_bias_update_rate=0.001,
    )
    cfg.train.global_batch_size = 128
    cfg.mixed_precision = MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False)
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 64 GPUs (TP2 PP16 EP4) or a multiple; 128 samples of 2048 tokens a step."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="deepseek-ai/DeepSeek-V3",
        hf_config=hf_config(),
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=16,
        pipeline_model_parallel_layout="Et*4|(t*4|)*14tL",
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        recompute_granularity="selective",
        recompute_modules=["mla_up_proj", "layernorm"],
        mtp_num_layers=0,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        moe_router_bias_update_rate=0.0,
    )
    cfg.train.global_batch_size = 128
    return cfg
