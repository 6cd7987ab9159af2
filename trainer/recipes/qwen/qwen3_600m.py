"""Qwen3 0.6B: pretraining, fine-tuning of all weights, and LoRA or DoRA.

import weightcast.trainer.recipes.qwen.qwen3_600m as qwen3_600m

cfg = qwen3_600m.pretrain_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/Qwen/Qwen3-0.6B, for what the model is."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def pretrain_config() -> ConfigContainer:
    """Pretraining, on 1 GPU or a multiple; 32 sequences of 4096 tokens a step."""
    cfg = pretrain_defaults()
    cfg.model = ModelConfig(
        hf_config=hf_config(),
    )
    return cfg


def sft_config() -> ConfigContainer:
    """Fine-tuning of all weights, on 1 GPU or a multiple; 8 samples of 2048 tokens a step."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen3-0.6B",
        hf_config=hf_config(),
    )
    cfg.train.global_batch_size = 8
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 1 GPU or a multiple; 8 samples of 2048 tokens a step."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen3-0.6B",
        hf_config=hf_config(),
    )
    cfg.train.global_batch_size = 8
    return cfg
