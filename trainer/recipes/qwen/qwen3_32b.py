"""Qwen3 32B: pretraining, fine-tuning of all weights, and LoRA or DoRA.

import weightcast.trainer.recipes.qwen.qwen3_32b as qwen3_32b

cfg = qwen3_32b.pretrain_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/Qwen/Qwen3-32B, for what the model is."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 25600,
        "max_position_embeddings": 40960,
        "max_window_layers": 64,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def pretrain_config() -> ConfigContainer:
    """Pretraining, on 16 GPUs (TP8 PP2) or a multiple; 32 sequences of 4096 tokens a step."""
    cfg = pretrain_defaults()
    cfg.model = ModelConfig(
        hf_config=hf_config(),
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=2,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    return cfg


def sft_config() -> ConfigContainer:
    """Fine-tuning of all weights, on 16 GPUs (TP8 PP2) or a multiple; 8 samples of 2048 tokens a step."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen3-32B",
        hf_config=hf_config(),
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=2,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    cfg.train.global_batch_size = 8
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 1 GPU or a multiple; 8 samples of 2048 tokens a step."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen3-32B",
        hf_config=hf_config(),
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    cfg.train.global_batch_size = 8
    return cfg
