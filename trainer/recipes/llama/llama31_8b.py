"""Llama 3.1 8B: pretraining, fine-tuning of all weights, and LoRA or DoRA.

import weightcast.trainer.recipes.llama.llama31_8b as llama31_8b

cfg = llama31_8b.pretrain_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/meta-llama/Meta-Llama-3.1-8B, for what the model is."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }


def pretrain_config() -> ConfigContainer:
    """Pretraining, on 2 GPUs (CP2) or a multiple; 512 sequences of 8192 tokens a step."""
    cfg = pretrain_defaults()
    cfg.model = ModelConfig(
        hf_config=hf_config(),
        context_parallel_size=2,
    )
    cfg.train.train_iters = 1_168_251
    cfg.train.global_batch_size = 512
    cfg.train.micro_batch_size = 1
    cfg.scheduler.lr_warmup_iters = 2000
    cfg.scheduler.lr_decay_iters = cfg.train.train_iters
    cfg.dataset.seq_length = 8192
    return cfg


def sft_config() -> ConfigContainer:
    """Fine-tuning of all weights, on 2 GPUs (TP2) or a multiple; 8 samples of 2048 tokens a step."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="meta-llama/Meta-Llama-3.1-8B",
        hf_config=hf_config(),
        tensor_model_parallel_size=2,
    )
    cfg.train.global_batch_size = 8
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 1 GPU or a multiple; 8 samples of 2048 tokens a step."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="meta-llama/Meta-Llama-3.1-8B",
        hf_config=hf_config(),
    )
    cfg.train.global_batch_size = 8
    return cfg
