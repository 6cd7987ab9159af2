"""Small random models of the dense families beyond Llama and Qwen, and of ropes with a longer context.

Every feature is on, and strong enough that leaving it out moves the logits by far more than any tolerance: caps as
small as the scores, windows and original contexts shorter than the sequences of `parity_job.tokens()`.

    write_dense_model("gemma2", tmp_path / "gemma2")  # the checkpoint, and transformers' logits, loss and gradients
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import weightcast.bridges  # noqa: F401

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.parity_job import write_expected  # isort: skip
from tests.bridges.parity_models import COMMON, DEFAULT_ROPE  # isort: skip

TIED = {"tie_word_embeddings": True}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}
# With this base and length the frequencies of a head of 16 reach both ends of the ramp and its middle.
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Six of the eight pairs of a head of 16 are rotated.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 9.0],
}
PHI = COMMON | IDS | {"hidden_size": 64, "initializer_range": 0.1, "rope_parameters": LONGROPE}

DENSE_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "mistral-window": lambda: MistralConfig(**COMMON, head_dim=16, sliding_window=6, rope_parameters=DEFAULT_ROPE),
    "mistral-tied-yarn": lambda: MistralConfig(**COMMON | TIED, sliding_window=None, rope_parameters=YARN),
    "gemma2": lambda: Gemma2Config(
        **COMMON | TIED,
        head_dim=16,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        sliding_window=6,
        attention_bias=True,
        rope_parameters=DEFAULT_ROPE,
    ),
    "phi3-long": lambda: Phi3Config(**PHI, original_max_position_embeddings=16, sliding_window=9),
    "phi3-short": lambda: Phi3Config(**PHI | TIED, original_max_position_embeddings=64),
    "phi4": lambda: Phi3Config(**PHI | {"rope_parameters": DEFAULT_ROPE, "num_key_value_heads": 4}),
    "glm": lambda: GlmConfig(**COMMON | IDS, head_dim=16, rope_parameters=ROPE, attention_bias=False),
    "glm4": lambda: Glm4Config(**COMMON | IDS, head_dim=16, rope_parameters=ROPE, attention_bias=True),
    "llama-yarn": lambda: LlamaConfig(
        **COMMON, head_dim=16, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}
    ),
    "qwen2-yarn": lambda: Qwen2Config(**COMMON, rope_parameters=YARN | {"beta_fast": 8.0, "beta_slow": 2.0}),
    "qwen3-yarn": lambda: Qwen3Config(
        **COMMON, head_dim=16, rope_parameters=YARN | {"attention_factor": 0.8, "truncate": False}
    ),
}


def write_dense_model(name: str, folder: Path) -> None:
    """Save a random checkpoint to `folder/model`, and what transformers computes of it as `parity_job` expects it."""
    torch.manual_seed(len(name))
    # transformers' other attentions leave out Gemma 2's cap of attention scores.
    model = AutoModelForCausalLM.from_config(DENSE_MODELS[name](), dtype=torch.float32, attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as constants and biases as zeros, under which mistakes are invisible
                parameter.add_(torch.randn_like(parameter) * 0.3)
    folder.mkdir(parents=True)
    write_expected(model, folder)
