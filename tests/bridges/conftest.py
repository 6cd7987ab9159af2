"""The tiny models on disk, written once a session."""

from pathlib import Path

import pytest
import torch
from tests.bridges.tiny_models import TINY_MODELS, write_tiny_model

# Bits must survive in the dtype that models really have as well.
IN_BF16 = ("llama3.2", "gemma3", "glm4-moe")
# Many files with an index, as large models have.
IN_SHARDS = ("llama-biases", "qwen3", "qwen2-moe")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one HF folder for each name of `TINY_MODELS`."""
    root = tmp_path_factory.mktemp("tiny_models")
    for name in TINY_MODELS:
        dtype = torch.bfloat16 if name in IN_BF16 else torch.float32
        write_tiny_model(name, root / name, dtype=dtype, shard_bytes=60_000 if name in IN_SHARDS else None)
    return root
