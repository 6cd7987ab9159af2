"""How long a real engine answers nobody while it takes a version: the embedded `transformers` engine, 1.19 GB, bf16."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from harness import HERE, Record, running_publisher, time_copy
from safetensors.torch import save_file
from transformers import Qwen3Config

from weightcast.sync import TensorSpec

ENGINE = "bench"


def write_checkpoint(folder: Path, specs: list[TensorSpec]) -> Path:
    """A Qwen3-0.6B folder with weights of zero: the engine's first version brings others."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    tensors = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_pause(rounds: int, specs: list[TensorSpec], folder: Path) -> Record:
    """Publish into a serving engine; the pause is what the engine reports, the copy is taken in the same round."""
    model = write_checkpoint(folder / "model", specs)
    source = [torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs]
    target = [torch.ones(spec.shape, dtype=spec.dtype) for spec in specs]
    pauses_s: list[float] = []
    copies_s: list[float] = []
    shares: list[float] = []
    with running_publisher(["tcp://127.0.0.1:0"]) as publisher:
        command = [sys.executable, "-m", "weightcast.adapters.transformers.server", "--model", str(model)]
        command += ["--port", "0", "--publisher", publisher.addresses[0], "--engine", ENGINE]
        log_file = HERE / "results" / "engine.log"
        with log_file.open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            engine = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            publisher.send("wait", 0, 1)
            publisher.read()
            for number in range(rounds + 1):
                copy_s = time_copy(source, target)
                publisher.send("publish", 0, number + 1)
                answer = publisher.read()
                if number:
                    copies_s.append(copy_s)
                    pauses_s.append(answer["pauses_s"][ENGINE])
                    shares.append(pauses_s[-1] / sum(answer["phases_s"].values()))
        finally:
            engine.terminate()
            engine.wait(30)
    log_file.unlink()
    value, copy_s = statistics.median(pauses_s), statistics.median(copies_s)
    note = f"{statistics.median(shares):.0%} of the whole publish"
    return Record("pause_transformers", value, "s", "memcpy", copy_s, value / copy_s, rounds, note)
