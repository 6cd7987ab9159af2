"""Small random models with adapters of the `peft` library, and what `peft` computes with them.

Every kind of adapter meets every kind of linear: fused in Megatron or in HF, with a bias of its own or one that the
caller adds, with a norm behind it. B and the magnitudes are random, since fresh ones change nothing.

    write_adapter("dora-biases", tmp_path / "dora-biases")  # model/, adapter/, gradients/, expected.safetensors
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config

import weightcast.bridges  # noqa: F401

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.parity_job import tokens  # isort: skip
from tests.bridges.parity_models import COMMON, DEFAULT_ROPE  # isort: skip

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class AdapterCase:
    """A model and the adapter that `peft` puts on it."""

    config: Callable[[], PretrainedConfig]
    targets: Sequence[str]
    settings: dict[str, Any] = field(default_factory=dict)
    shared_inputs: bool = False
    """Query, key and value have one A, and so have gate and up: what a fused linear of Megatron can hold."""


def _llama() -> PretrainedConfig:
    return LlamaConfig(**COMMON, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=DEFAULT_ROPE)


def _qwen2() -> PretrainedConfig:
    return Qwen2Config(**COMMON | {"tie_word_embeddings": True}, rope_parameters=DEFAULT_ROPE)


def _gemma2() -> PretrainedConfig:
    return Gemma2Config(
        **COMMON,
        head_dim=16,
        query_pre_attn_scalar=24,
        attention_bias=True,
        sliding_window=6,
        rope_parameters=DEFAULT_ROPE,
    )


def _phi3() -> PretrainedConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Phi3Config(**COMMON | ids, rope_parameters=DEFAULT_ROPE)


# Other ranks for a part of a fused linear, for all linears of a name, and for one of them.
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"v_proj": 3, "model.layers.1.mlp.down_proj": 2},
    "alpha_pattern": {"o_proj": 5, "model.layers.2.self_attn.q_proj": 7.5},
}
CASES: dict[str, AdapterCase] = {
    "lora": AdapterCase(_qwen2, ATTENTION + MLP),
    "lora-fused-rslora": AdapterCase(_llama, ATTENTION + MLP, {"use_rslora": True}, shared_inputs=True),
    "lora-behind-norms": AdapterCase(_gemma2, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], PATTERNS),
    "lora-fused-in-hf": AdapterCase(_phi3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "dora": AdapterCase(_qwen2, ["q_proj", "v_proj", "o_proj", *MLP], {"use_dora": True} | PATTERNS),
    "dora-fused-biases": AdapterCase(_llama, ATTENTION + MLP, {"use_dora": True}, shared_inputs=True),
}
RANK, ALPHA = 6, 9


def write_adapter(name: str, folder: Path) -> None:
    """Save the base model, the adapter, and `peft`'s logits, loss and gradients for `tokens()`."""
    case = CASES[name]
    torch.manual_seed(len(name))
    base = AutoModelForCausalLM.from_config(case.config(), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    base.save_pretrained(folder / "model")
    base.name_or_path = str(folder / "model")
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(case.targets), task_type="CAUSAL_LM", **case.settings
    )
    model = get_peft_model(base, config).eval()
    _randomise(model, case.shared_inputs)
    model.save_pretrained(folder / "adapter")
    expected = _save_gradients(model, folder)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    with torch.no_grad():
        expected["merged_logits"] = merged(tokens()[:, :-1]).logits
    save_file(expected, folder / "expected.safetensors")


def _randomise(model: PeftModel, shared_inputs: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_magnitude_vector." in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for group in FUSED if shared_inputs else ():
            for name, parameter in parameters.items():
                if f".{group[0]}.lora_A." in name:
                    for other in group[1:]:
                        parameters[name.replace(group[0], other)].copy_(parameter)


def _save_gradients(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """Gives logits and loss."""
    logits = model(input_ids=tokens()[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten())
    torch.autograd.backward(loss)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in trained]
    for parameter in trained:
        assert parameter.grad is not None
        parameter.data = parameter.grad
    model.save_pretrained(folder / "gradients")
    for parameter, value in zip(trained, values, strict=True):
        parameter.data = value
    return {"logits": logits.detach(), "loss": loss.detach()}


def peft_logits(model: Path, adapter: Path) -> torch.Tensor:
    """The logits for `tokens()` of an adapter as `peft` loads it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits: torch.Tensor = loaded(input_ids=tokens()[:, :-1]).logits
    return logits


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """How many fp32 numbers lie between two tensors' elements, at most."""
    assert ours.dtype == theirs.dtype == torch.float32
    ordered = [
        torch.where(bits < 0, -(2**31) - bits, bits) for bits in (t.view(torch.int32).long() for t in (ours, theirs))
    ]
    return int((ordered[0] - ordered[1]).abs().max())


def adapter_tensors(adapter: Path) -> dict[str, torch.Tensor]:
    """All tensors of a PEFT folder."""
    tensors: dict[str, torch.Tensor] = load_file(adapter / "adapter_model.safetensors")
    return tensors


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """The settings of a PEFT folder."""
    settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return settings
