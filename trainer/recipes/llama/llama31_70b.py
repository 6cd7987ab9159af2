"""Llama 3.1 70B: pretraining, fine-tuning of all weights, and LoRA or DoRA.

import weightcast.trainer.recipes.llama.llama31_70b as llama31_70b

cfg = llama31_70b.pretrain_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/meta-llama/Meta-Llama-3.1-70B, for what the model is."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "initializer_range": 0.02,
        "intermediate_size": 28672,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
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
    """Pretraining, on 32 GPUs (TP4 PP4 CP2) or a multiple; 512 sequences of 8192 tokens a step."""
    cfg = pretrain_defaults()
    cfg.model = ModelConfig(
        hf_config=hf_config(),
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=5,
        context_parallel_size=2,
        sequence_parallel=True,
    )
    cfg.train.train_iters = 1_168_251
    cfg.train.global_batch_size = 512
    cfg.train.micro_batch_size = 1
    cfg.scheduler.lr_warmup_iters = 2000
    cfg.scheduler.lr_decay_iters = cfg.train.train_iters
    cfg.dataset.seq_length = 8192
    return cfg


def sft_config() -> ConfigContainer:
    """Fine-tuning of all weights, on 32 GPUs (TP8 PP4) or a multiple; 8 samples of 2048 tokens a step."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="meta-llama/Meta-Llama-3.1-70B",
        hf_config=hf_config(),
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=4,
    )
    cfg.train.global_batch_size = 8
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 8 GPUs (TP8) or a multiple; 8 samples of 2048 tokens a step."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="meta-llama/Meta-Llama-3.1-70B",
        hf_config=hf_config(),
        tensor_model_parallel_size=8,
    )
    cfg.train.global_batch_size = 8
    return cfg
