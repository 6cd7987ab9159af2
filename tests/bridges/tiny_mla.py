"""Random small models with multi-head latent attention, for parity and for bits.

The sizes of a head's parts all differ, latents are odd multiples of four (they are cut by TP=2), and the epsilon of the
norms is one that only some of them must take. Groups are scored so that the wrong way of it shows.

    write_mla_model("deepseek-v3", tmp_path)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PretrainedConfig, PreTrainedModel

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
YARN_WITHOUT_MSCALE = {name: value for name, value in YARN.items() if not name.startswith("mscale")}
V2_GROUPS: dict[str, Any] = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 4.0,
}
V3_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
ONE_GROUP: dict[str, Any] = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "norm_topk_prob": True}


def _v2(**changes: Any) -> PretrainedConfig:
    return DeepseekV2Config(**SIZES | {"rope_parameters": DEFAULT_ROPE} | changes)


def _v3(**changes: Any) -> PretrainedConfig:
    return DeepseekV3Config(**SIZES | {"rope_parameters": DEFAULT_ROPE, "num_nextn_predict_layers": 0} | changes)


MLA_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "deepseek-v2-lite": lambda: _v2(q_lora_rank=None, rope_parameters=YARN),
    "deepseek-v2": lambda: _v2(**V2_GROUPS, q_lora_rank=24),
    "deepseek-v2-dense": lambda: _v2(q_lora_rank=24, first_k_dense_replace=4, rope_parameters=YARN),
    "deepseek-v3": lambda: _v3(**V3_GROUPS, q_lora_rank=24, rope_parameters=YARN_WITHOUT_MSCALE),
    "moonlight": lambda: _v3(**ONE_GROUP, q_lora_rank=None),
}


def kimi_k2() -> PretrainedConfig:
    """With the one group and the YaRN of Kimi K2, both of whose betas are 1."""
    yarn = YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return _v3(**ONE_GROUP | {"routed_scaling_factor": 2.827}, q_lora_rank=24, rope_parameters=yarn)


# DeepSeek V3's architecture once more, which not every test need look at.
ALL_MLA_MODELS = MLA_MODELS | {"kimi-k2": kimi_k2}


def make_mla_model(name: str) -> PreTrainedModel:
    """The random model in fp32, with nothing left at the constants that a new model starts with."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(ALL_MLA_MODELS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def write_mla_model(name: str, folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Save the model in `dtype`; of the fp32 model also what transformers computes from `tokens`, inputs and one more.

    Logits and loss go to `expected.safetensors`, gradients to a folder of their own as if they were a model, because
    experts have other names in memory than on disk.
    """
    model = make_mla_model(name)
    logits = model(tokens[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    save_file({"logits": logits.detach(), "loss": loss.detach()}, folder / "expected.safetensors")
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers keep fp32
    model.config.dtype = dtype
    model.save_pretrained(folder / "model")
    for parameter, gradient in gradients.items():
        parameter.data = gradient if gradient is not None else torch.zeros_like(parameter)
    model.save_pretrained(folder / "gradients")
