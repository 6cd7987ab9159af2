"""What a demo is asked for, checked before anything is started: one clear error instead of a process that dies.

request = DemoRequest(engine="vllm", model="path/to/hf", steps=4)
check_request(request)
folder = find_model("path/to/hf")
check_layout(read_config(folder), tensor_parallel=2)
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcast.sync.errors import ConfigError

ENGINES = ("transformers", "vllm")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRequest:
    """One run of the demo."""

    engine: str = "transformers"
    model: str | None = None  # a folder or a hub id; None takes the embedded model
    data: Path | None = None  # a text file; None takes Python's standard library
    steps: int = 6
    tensor_parallel: int | None = None  # None takes 2, or 1 where there is one GPU
    out: Path = Path("out/demo")
    learning_rate: float | None = None  # None takes what suits the model
    max_tokens: int = 24  # length of each answer of the proof


def check_request(request: DemoRequest) -> None:
    """Raise ConfigError on what cannot work whatever the model is."""
    if request.engine not in ENGINES:
        raise ConfigError(f"unknown engine {request.engine!r}; choose one of {', '.join(ENGINES)}")
    for name, value in (("steps", request.steps), ("tp", request.tensor_parallel), ("tokens", request.max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be 1 or more, got {value}")
    if request.learning_rate is not None and not request.learning_rate > 0:
        raise ConfigError(f"--lr must be above 0, got {request.learning_rate}")
    if request.data is not None:
        check_text(request.data)


def check_text(path: Path) -> None:
    """Raise ConfigError unless `path` is a file with some text in it."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; --data wants a text file in UTF-8")
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if not start.strip():
        raise ConfigError(f"the data file {path} is empty; --data wants a text file in UTF-8")
    if b"\0" in start:
        raise ConfigError(f"the data file {path} is binary; --data wants a text file in UTF-8")


def find_model(model: str) -> Path:
    """The folder of a model: the given one, or what the hub has under this id (downloaded into the hub's cache).

    Raises ConfigError when it is neither, and when the folder holds no Hugging Face checkpoint.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(model):
            raise ConfigError(
                f"the model folder {model} does not exist; --model wants a Hugging Face folder or a hub id"
            )
        folder = _download(model)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"the model folder {folder} has no config.json, so it is no Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"the model folder {folder} has no *.safetensors file; save the model with save_pretrained")
    return folder


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub's client has errors of many libraries; each means that there is no model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{model} is no folder here, and the hub did not give it: {reason}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ConfigError when it is not a JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'} is not a JSON object")
    return config


def check_layout(config: dict[str, Any], tensor_parallel: int) -> None:
    """Raise ConfigError when `tensor_parallel` ranks cannot share the layers of a model with this config.json."""
    for field in ("num_attention_heads", "intermediate_size"):
        size = config.get(field)
        if isinstance(size, int) and size % tensor_parallel:
            raise ConfigError(
                f"--tp {tensor_parallel} does not divide the model's {field}, {size}; choose a divisor of it"
            )
    groups = config.get("num_key_value_heads")
    if isinstance(groups, int) and groups % tensor_parallel and tensor_parallel % groups:
        raise ConfigError(
            f"--tp {tensor_parallel} neither divides the model's num_key_value_heads, {groups}, nor is a multiple of it"
        )
