"""Gemma 3 270M: pretraining, fine-tuning of all weights, LoRA and DoRA.

import weightcast.trainer.recipes.gemma.gemma3_270m as gemma3_270m

cfg = gemma3_270m.sft_config()
"""

from typing import Any

from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.recipes.defaults import peft_defaults, pretrain_defaults, sft_defaults

# The turns that Gemma's instruction-tuned models know; the checkpoint that was only pretrained has no template. There
# is no turn for a system message: it stands before what the user says first.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set preface = messages[0].content | trim + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if preface else messages) %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
{{- (preface if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""


def hf_config() -> dict[str, Any]:
    """The config.json of https://huggingface.co/google/gemma-3-270m, for what the model is."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_types": [*(["sliding_attention"] * 5 + ["full_attention"]) * 3],
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    }


def pretrain_config() -> ConfigContainer:
    """Pretraining, on 1 GPU or a multiple; 32 sequences of 4096 tokens a step."""
    cfg = pretrain_defaults()
    cfg.model = ModelConfig(
        hf_config=hf_config(),
    )
    return cfg


def sft_config() -> ConfigContainer:
    """Fine-tuning of all weights, on 1 GPU or a multiple; 8 samples of 2048 tokens a step, as Gemma's turns."""
    cfg = sft_defaults()
    cfg.model = ModelConfig(
        hf_path="google/gemma-3-270m",
        hf_config=hf_config(),
    )
    cfg.train.global_batch_size = 8
    cfg.tokenizer.chat_template = CHAT_TEMPLATE
    return cfg


def peft_config(scheme: str = "lora") -> ConfigContainer:
    """LoRA or DoRA (`peft.scheme`), on 1 GPU or a multiple; 8 samples of 2048 tokens a step, as Gemma's turns."""
    cfg = peft_defaults(scheme)
    cfg.model = ModelConfig(
        hf_path="google/gemma-3-270m",
        hf_config=hf_config(),
    )
    cfg.train.global_batch_size = 8
    cfg.tokenizer.chat_template = CHAT_TEMPLATE
    return cfg
