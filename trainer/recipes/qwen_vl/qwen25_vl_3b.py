"""Qwen2.5-VL 3B: pretraining, fine-tuning of all weights, and LoRA or DoRA.

import weightcast.trainer.recipes.qwen_vl.qwen25_vl_3b as qwen25_vl_3b

cfg = qwen25_vl_3b.pretrain_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct, for what the model is."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "image_token_id": 151655,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [16, 24, 24],
        },
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "video_token_id": 151656,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vision_token_id": 151654,
        "vocab_size": 151936,
    }


def pretrain_config() -> ConfigContainer:
    """Pretraining, on 1 GPU or a multiple; 32 sequences of 4096 tokens a step."""
    cfg = pretrain_defaults()
    cfg.model = ModelConfig(
        hf_config=hf_config(),
    )
    cfg.train.micro_batch_size = 1
    return cfg


def sft_config() -> ConfigContainer:
    """Fine-tuning of all weights, on 1 GPU or a multiple; 32 samples of 2048 tokens a step."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen2.5-VL-3B-Instruct",
        hf_config=hf_config(),
    )
    cfg.train.global_batch_size = 32
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 1 GPU or a multiple; 32 samples of 2048 tokens a step."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="Qwen/Qwen2.5-VL-3B-Instruct",
        hf_config=hf_config(),
    )
    cfg.train.global_batch_size = 32
    return cfg
