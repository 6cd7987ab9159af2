"""The families of the support page: their titles, their bridges, and the random small models that stand for them.

Sizes and features of the models are those of the tables that other tests use (`parity_models`, `tiny_dense`,
`tiny_mla`); here they are put into one list, with how each is written to disk.

    FAMILIES["gemma2"].models["gemma2"](tmp_path / "gemma2")  # the checkpoint, and what transformers computes of it
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import weightcast.bridges  # noqa: F401

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.parity_job import tokens, write_model  # isort: skip
from tests.bridges.tiny_dense import write_dense_model  # isort: skip
from tests.bridges.test_qwen25_vl import gradient_difference, logits_difference  # isort: skip
from tests.bridges.tiny_gpt_oss import GPT_OSS_MODELS, write_gpt_oss_model  # isort: skip
from tests.bridges.tiny_mla import write_mla_model  # isort: skip
from tests.bridges.tiny_mtp import MTP_MODELS, write_mtp_model  # isort: skip
from tests.bridges.tiny_qwen25_vl import VL_MODELS, write_vl_model  # isort: skip

Writer = Callable[[Path], None]
"""Writes `model`, `gradients` and `expected.safetensors` into a folder that is not there yet."""
Compare = Callable[[Path, dict[str, Any]], float]
"""The largest difference of the folder's model under a layout's settings; a collective."""


@dataclass(frozen=True)
class Family:
    """One row of the page."""

    title: str
    bridge: str
    """`ModelBridge.family` of the registry."""
    models: Mapping[str, Writer]
    """By name."""
    kind: str = "dense"
    """Of `layout_tables.KINDS`."""
    logits: Compare | None = None
    """In place of the run's own comparison, for models that want more than tokens."""
    gradients: Compare | None = None

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit that is allowed."""
        return 2e-5 if self.kind in ("experts", "prediction") else 1e-5


def _write_plain(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_model(name, folder)


def _write_latent(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_mla_model(name, folder, tokens())


def _write_kimi(name: str, folder: Path) -> None:
    """Under the type that its folders name and transformers does not have."""
    _write_latent(name, folder)
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "kimi_k2"}))


def _write_prediction(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_mtp_model(name, folder, tokens())


def _write_vision(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_vl_model(name, folder)


def _write_gpt_oss(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_gpt_oss_model(name, folder)


def _plain(*names: str) -> dict[str, Writer]:
    return {name: partial(_write_plain, name) for name in names}


def _dense(*names: str) -> dict[str, Writer]:
    return {name: partial(write_dense_model, name) for name in names}


def _latent(*names: str) -> dict[str, Writer]:
    return {name: partial(_write_latent, name) for name in names}


_LLAMA = ("llama2", "llama3-tied-one-kv-head", "llama-linear-rope-all-biases")

FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama 2, 3, 3.1, 3.2, 3.3", "llama", _plain(*_LLAMA) | _dense("llama-yarn")),
    "qwen2": Family(
        "Qwen2, Qwen2.5", "qwen2", _plain("qwen2-one-kv-head", "qwen2-tied-windows") | _dense("qwen2-yarn")
    ),
    "qwen3": Family("Qwen3", "qwen3", _plain("qwen3-biases-windows", "qwen3-tied-one-kv-head") | _dense("qwen3-yarn")),
    "qwen3-moe": Family(
        "Qwen3-MoE",
        "qwen3_moe",
        _plain("qwen3-moe-biases-one-dense-layer", "qwen3-moe-tied-unnormalised"),
        kind="experts",
    ),
    "qwen2-moe": Family("Qwen2-MoE", "qwen2_moe", _plain("qwen2-moe-gated-shared-expert"), kind="experts"),
    "mistral": Family("Mistral", "mistral", _dense("mistral-window", "mistral-tied-yarn")),
    "mixtral": Family("Mixtral", "mixtral", _plain("mixtral-window"), kind="experts"),
    "gemma2": Family("Gemma 2", "gemma2", _dense("gemma2")),
    "gemma3": Family("Gemma 3 (text)", "gemma3", _plain("gemma3-tied-one-kv-head", "gemma3-biases")),
    "phi3": Family("Phi-3, 3.5, 4", "phi3", _dense("phi3-long", "phi3-short", "phi4")),
    "glm": Family("GLM", "glm", _dense("glm")),
    "glm4": Family("GLM-4", "glm4", _dense("glm4")),
    "glm4-moe": Family("GLM-4.5", "glm4_moe", _plain("glm4-moe-groups"), kind="experts"),
    "deepseek-v2-lite": Family("DeepSeek V2-Lite", "deepseek-v2", _latent("deepseek-v2-lite"), kind="experts"),
    "deepseek-v2": Family("DeepSeek V2", "deepseek-v2", _latent("deepseek-v2"), kind="experts"),
    "deepseek-v3": Family("DeepSeek V3, R1", "deepseek-v3", _latent("deepseek-v3"), kind="experts"),
    "moonlight": Family("Moonlight", "deepseek-v3", _latent("moonlight"), kind="experts"),
    "prediction": Family(
        "DeepSeek V3, R1, GLM-4.5: multi-token prediction",
        "deepseek-v3",
        {name: partial(_write_prediction, name) for name in MTP_MODELS},
        kind="prediction",
    ),
    "kimi-k2": Family("Kimi K2", "deepseek-v3", {"kimi-k2": partial(_write_kimi, "kimi-k2")}, kind="experts"),
    "qwen2.5-vl": Family(
        "Qwen2.5-VL, images and video",
        "qwen2_5_vl",
        {name: partial(_write_vision, name) for name in VL_MODELS},
        kind="vision",
        logits=logits_difference,
        gradients=gradient_difference,
    ),
    "gpt-oss": Family(
        "gpt-oss", "gpt-oss", {name: partial(_write_gpt_oss, name) for name in GPT_OSS_MODELS}, kind="experts"
    ),
}


def family_of(model: str) -> Family:
    """The family that a model stands for."""
    return next(family for family in FAMILIES.values() if model in family.models)
