"""The families of the support page: their titles, their bridges, and the random small models that stand for them.

Sizes and features of the models are those of the tables that other tests use (`parity_models`, `tiny_dense`,
`tiny_mla`); here they are put into one list, with how each is written to disk.

    FAMILIES["gemma2"].models["gemma2"](tmp_path / "gemma2")  # the checkpoint, and what transformers computes of it
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import weightcast.bridges  # noqa: F401

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.parity_job import tokens, write_model  # isort: skip
from tests.bridges.tiny_dense import write_dense_model  # isort: skip
from tests.bridges.tiny_mla import write_mla_model  # isort: skip

Writer = Callable[[Path], None]
"""Writes `model`, `gradients` and `expected.safetensors` into a folder that is not there yet."""


@dataclass(frozen=True)
class Family:
    """One row of the page."""

    title: str
    bridge: str
    """`ModelBridge.family` of the registry."""
    models: Mapping[str, Writer]
    """By name; none where a test of its own compares the family."""
    experts: bool = False
    latent: bool = False
    elsewhere: str = ""
    """What compares the family, where this run does not."""

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit that is allowed."""
        return 2e-5 if self.experts or self.latent else 1e-5


def _write_plain(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_model(name, folder)


def _write_latent(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_mla_model(name, folder, tokens())


def _plain(*names: str) -> dict[str, Writer]:
    return {name: partial(_write_plain, name) for name in names}


def _dense(*names: str) -> dict[str, Writer]:
    return {name: partial(write_dense_model, name) for name in names}


def _latent(*names: str) -> dict[str, Writer]:
    return {name: partial(_write_latent, name) for name in names}


_LLAMA = ("llama2", "llama3-tied-one-kv-head", "llama-linear-rope-all-biases")
_PREDICTION = "tests/bridges/test_mtp.py"

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
        experts=True,
    ),
    "qwen2-moe": Family("Qwen2-MoE", "qwen2_moe", _plain("qwen2-moe-gated-shared-expert"), experts=True),
    "mistral": Family("Mistral", "mistral", _dense("mistral-window", "mistral-tied-yarn")),
    "mixtral": Family("Mixtral", "mixtral", _plain("mixtral-window"), experts=True),
    "gemma2": Family("Gemma 2", "gemma2", _dense("gemma2")),
    "gemma3": Family("Gemma 3 (text)", "gemma3", _plain("gemma3-tied-one-kv-head", "gemma3-biases")),
    "phi3": Family("Phi-3, 3.5, 4", "phi3", _dense("phi3-long", "phi3-short", "phi4")),
    "glm": Family("GLM", "glm", _dense("glm")),
    "glm4": Family("GLM-4", "glm4", _dense("glm4")),
    "glm4-moe": Family("GLM-4.5", "glm4_moe", _plain("glm4-moe-groups"), experts=True),
    "deepseek-v2-lite": Family(
        "DeepSeek V2-Lite", "deepseek-v2", _latent("deepseek-v2-lite"), experts=True, latent=True
    ),
    "deepseek-v2": Family("DeepSeek V2", "deepseek-v2", _latent("deepseek-v2"), experts=True, latent=True),
    "deepseek-v3": Family("DeepSeek V3, R1", "deepseek-v3", _latent("deepseek-v3"), experts=True, latent=True),
    "moonlight": Family("Moonlight", "deepseek-v3", _latent("moonlight"), experts=True, latent=True),
    "kimi-k2": Family("Kimi K2", "deepseek-v3", {}, elsewhere=_PREDICTION),
    "qwen2.5-vl": Family("Qwen2.5-VL", "qwen2_5_vl", {}, elsewhere="tests/bridges/test_qwen25_vl.py"),
    "gpt-oss": Family("gpt-oss", "gpt-oss", {}, elsewhere="tests/bridges/test_gpt_oss.py"),
}


def models_of(families: Iterable[Family]) -> dict[str, Writer]:
    """All models of `families`, by name."""
    return {name: writer for family in families for name, writer in family.models.items()}
