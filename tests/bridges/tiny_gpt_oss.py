"""Small random gpt-oss models, for parity and for bits, and their checkpoints in MXFP4 as they are published.

Sizes of experts are multiples of 32, the codes' block, under TP=2 as well; the clamp cuts into most gates, the window
is shorter than the sequences of `parity_job.tokens()`. One model's experts are square, as gpt-oss's own are: there no
shape tells a matrix from its transpose.

    write_gpt_oss_model("gpt-oss", tmp_path)
    write_in_mxfp4(tmp_path / "model", tmp_path / "coded")
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, PretrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "sliding_window": 6,
    "swiglu_limit": 0.7,
    "tie_word_embeddings": False,
}
# With this base and length the frequencies of a small head reach both ends of the ramp and its middle.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
    "truncate": False,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}

GPT_OSS_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt-oss": lambda: GptOssConfig(**SIZES, rope_parameters=YARN),
    "gpt-oss-square-tied": lambda: GptOssConfig(
        **SIZES
        | {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 1}
        | {"tie_word_embeddings": True, "attention_bias": False, "rope_parameters": DEFAULT_ROPE}
    ),
}
MATRICES = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def make_gpt_oss_model(name: str) -> PreTrainedModel:
    """The random model in fp32, with nothing left at the constants that a new model starts with."""
    torch.manual_seed(len(name))
    config = GPT_OSS_MODELS[name]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.ndim == 1 or key.endswith("_bias"):
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def write_gpt_oss_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the model in `dtype` to `folder/model`; of an fp32 one also what `parity_job` compares with."""
    from tests.bridges.parity_job import write_expected

    model = make_gpt_oss_model(name)
    if dtype == torch.float32:
        write_expected(model, folder)
    else:
        model.to(dtype).save_pretrained(folder / "model")


def write_in_mxfp4(plain: Path, coded: Path) -> Path:
    """The checkpoint `plain` with random codes for its experts' matrices, as OpenAI publishes them. Returns `coded`."""
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(MATRICES):
            tensors[name] = tensor
            continue
        experts, num_in, num_out = tensor.shape
        shape = (experts, num_out, num_in // 32)
        codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = codes
        tensors[f"{name}_scales"] = torch.randint(117, 124, shape, generator=generator, dtype=torch.uint8)
    coded.mkdir()
    save_file(tensors, coded / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config.pop("dtype")  # published configurations do not say
    (coded / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return coded
