"""Checkpoints and engines that several tests share. Starting vLLM takes half a minute: one server a session."""

import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.adapters.models import make_model, save_checkpoint, tensors_of
from transformers import Qwen3ForCausalLM

from weightcast.adapters.vllm.client import VLLMClient


@dataclass(frozen=True)
class Checkpoint:
    """A model, its tensors and its HF folder."""

    model: Qwen3ForCausalLM
    tensors: dict[str, torch.Tensor]
    folder: Path


def make_checkpoint(seed: int, folder: Path, *, tied: bool = False) -> Checkpoint:
    model = make_model(seed, tied=tied)
    return Checkpoint(model, tensors_of(model), save_checkpoint(model, folder))


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What engines are started on."""
    return make_checkpoint(1, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What the trainer publishes."""
    return make_checkpoint(2, tmp_path_factory.mktemp("second"))


def free_port() -> int:
    """A port that is free, and stays so: none of those that the system gives to whoever connects somewhere."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("100 ports of the loopback are in use")


@contextmanager
def embedded_server(folder: Path, *flags: str) -> Iterator[VLLMClient]:
    """The embedded engine as a process of its own, on a free port."""
    command = [sys.executable, "-m", "weightcast.adapters.transformers.server", "--model", str(folder), "--port", "0"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), f"the server ended with {process.poll()}: {line}"
            with VLLMClient(line.split()[-1], timeout_s=60) as client:
                yield client
        finally:
            process.terminate()
            process.wait(20)
