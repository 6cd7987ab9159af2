"""Fixtures of the trainer's tests: tiny Hugging Face folders, and text of the words their tokenizer knows."""

import random
from pathlib import Path

import pytest
import torch
from tests.bridges.tiny_models import VOCAB_SIZE, write_tiny_model


def write_text(path: Path, num_words: int, seed: int) -> Path:
    """A file of words `w3` … `w130`, low numbers more often, so that there is something to learn."""
    draw = random.Random(seed)
    words = (f"w{3 + int(draw.betavariate(1, 6) * (VOCAB_SIZE - 3))}" for _ in range(num_words))
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen3 in fp32."""
    return write_tiny_model("qwen3-tied", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def gemma3_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 in bf16, with every feature the family has."""
    return write_tiny_model("gemma3", tmp_path_factory.mktemp("gemma3"), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three documents."""
    folder = tmp_path_factory.mktemp("texts")
    return [write_text(folder / f"{seed}.txt", 1500, seed) for seed in range(3)]
