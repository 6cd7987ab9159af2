"""Random small Hugging Face models of every family, with every feature on that its mapping has to care about.

Sizes are picked against accidents: the head dimension is not hidden size / heads, the vocabulary is odd (so Megatron
pads it under every layout), two key/value heads (so that TP=4 cuts inside a query group), four layers (PP=2 × VPP=2).

    folder = write_tiny_model("qwen3", tmp_path / "qwen3")
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 131
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = COMMON | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# The real models' factors; with this theta the frequencies of a small head reach all three bands.
LLAMA3_COMMON = COMMON | {"max_position_embeddings": 16384}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def _llama2() -> PretrainedConfig:
    return LlamaConfig(**COMMON | {"num_key_value_heads": 4}, head_dim=8, tie_word_embeddings=False)


def _llama31() -> PretrainedConfig:
    return LlamaConfig(**LLAMA3_COMMON, head_dim=16, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)


def _llama32() -> PretrainedConfig:
    return LlamaConfig(
        **LLAMA3_COMMON, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE | {"factor": 32.0}
    )


def _llama_biases() -> PretrainedConfig:
    return LlamaConfig(**COMMON, head_dim=16, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)


def _qwen2() -> PretrainedConfig:
    return Qwen2Config(**COMMON, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def _qwen2_tied() -> PretrainedConfig:
    return Qwen2Config(**COMMON, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def _qwen3() -> PretrainedConfig:
    return Qwen3Config(
        **COMMON,
        head_dim=16,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def _qwen3_tied() -> PretrainedConfig:
    return Qwen3Config(
        **COMMON, head_dim=16, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )


def _gemma3() -> PretrainedConfig:
    return Gemma3TextConfig(
        **COMMON,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters=GEMMA3_ROPE,
    )


def _qwen3_moe() -> PretrainedConfig:
    return Qwen3MoeConfig(
        **MOE,
        num_experts=4,
        head_dim=16,
        mlp_only_layers=[2],
        norm_topk_prob=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def _mixtral() -> PretrainedConfig:
    return MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)


def _qwen2_moe() -> PretrainedConfig:
    return Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=40, tie_word_embeddings=True)


def _glm4_moe() -> PretrainedConfig:
    return Glm4MoeConfig(
        **MOE,
        n_routed_experts=8,
        head_dim=16,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
        routed_scaling_factor=2.5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    )


TINY_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2": _llama2,
    "llama3.1": _llama31,
    "llama3.2": _llama32,
    "llama-biases": _llama_biases,
    "qwen2": _qwen2,
    "qwen2-tied": _qwen2_tied,
    "qwen3": _qwen3,
    "qwen3-tied": _qwen3_tied,
    "gemma3": _gemma3,
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
    "glm4-moe": _glm4_moe,
}

MOE_MODELS = ("qwen3-moe", "mixtral", "qwen2-moe", "glm4-moe")


def tiny_config(name: str) -> PretrainedConfig:
    """The configuration of a tiny model, as `AutoConfig` reads it back from a folder."""
    config = TINY_MODELS[name]()
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    return config


def write_tiny_model(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, shard_bytes: int | None = None
) -> Path:
    """Save a random tiny model with a tokenizer to `folder`, in one file or in shards; returns `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(TINY_MODELS[name](), dtype=dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            # Norm weights start as constants, and biases as zeros, under which many mistakes are invisible.
            tensor.add_(torch.randn_like(tensor) * 0.1 if tensor.ndim == 1 else 0)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=7)
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes is not None else {}))
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{number}": number for number in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
