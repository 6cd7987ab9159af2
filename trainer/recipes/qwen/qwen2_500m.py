"""Qwen2 0.5B: pretraining, fine-tuning of all weights, and LoRA or DoRA.

import weightcast.trainer.recipes.qwen.qwen2_500m as qwen2_500m

cfg = qwen2_500m.pretrain_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/Qwen/Qwen2-0.5B, for what the model is."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 131072,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
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
    """Fine-tuning of all weights, on 1 GPU or a multiple; 128 samples of 2048 tokens a step."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen2-0.5B",
        hf_config=hf_config(),
    )
    cfg.train.train_iters = 100
    cfg.scheduler.lr_decay_iters = 100
    cfg.scheduler.lr_warmup_iters = 10
    cfg.optimizer.adam_beta2 = 0.95
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 1 GPU or a multiple; 128 samples of 2048 tokens a step."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen2-0.5B",
        hf_config=hf_config(),
    )
    cfg.train.train_iters = 100
    cfg.scheduler.lr_decay_iters = 100
    cfg.scheduler.lr_warmup_iters = 10
    cfg.optimizer.adam_beta2 = 0.95
    return cfg
