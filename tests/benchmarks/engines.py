"""Cases with a real engine that serves: how long it answers nobody while it takes a version of 1.19 GB.

The engine is started on a checkpoint (`A`) and gets `B`, `A`, `B`, ... from the trainer's stand-in, where `B` is `A`
with all signs turned. vLLM's own load of `A` from its file says which tokens `A` gives: after every second version
they must come back, and after every other one they must be others. The embedded engine is held to the same.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from model_state import allocate, fill_normal
from moves import OURS
from peers import DEADLINE_S, Peer
from records import CaseError, Reading, Settings
from safetensors.torch import save_file
from shapes import MODELS

from weightcast.adapters.vllm.client import VLLMClient

ENGINE = "bench"
PROMPT = [11, 230, 3055, 7, 1024, 99]
NUM_TOKENS = 8


def write_checkpoint(folder: Path, model: str) -> Path:
    """`A`: a Qwen3 folder with the weights that the trainer's stand-in begins with."""
    from transformers import Qwen3Config  # long to import, and only these cases need it

    specs = MODELS[model]()
    tensors = allocate(specs)
    fill_normal(tensors, seed=0)
    vocab, hidden = tensors["model.embed_tokens.weight"].shape
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3072,
        num_hidden_layers=sum(spec.name.endswith("q_proj.weight") for spec in specs),
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure_pause(settings: Settings, *, engine: str) -> Reading:
    """Seconds of the pause that the engine reports, against the seconds of the whole publish."""
    model = "tiny" if settings.quick else "qwen3-0.6b"
    options = {"address": "tcp://127.0.0.1:0", "receivers": 1, "members": 2 if engine == "vllm" else 1}
    pauses_s: list[float] = []
    publishes_s: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = write_checkpoint(folder / "model", model)
        peer_settings = {"mover": OURS, "role": "sender", "model": model, "options": options, "state": {"step": "flip"}}
        sender = Peer(peer_settings)
        stack.callback(sender.close)
        stack.callback(sender.end)
        address = sender.read()["address"]
        started = (_vllm if engine == "vllm" else _embedded)(checkpoint, address, folder)
        client = stack.enter_context(started)
        seen = [_tokens(client)]
        sender.ask("open")
        # One version more than the rounds, and an even number of them: the last one is `A` again.
        for number in range(1, settings.rounds + 2 + settings.rounds % 2):
            sender.ask("step")
            move = sender.ask("move", number=number)
            seen.append(_tokens(client))
            if 1 < number <= settings.rounds + 1:
                pauses_s.append(max(report["pause_s"] for report in move["engines"].values()))
                publishes_s.append(move["end_s"] - move["start_s"])
        _check_tokens(seen)
    return Reading(pauses_s, publishes_s, "s", f"{engine}, {'tiny' if settings.quick else '1.19 GB'}, bf16")


def _check_tokens(seen: list[tuple[int, ...]]) -> None:
    """Versions alternate between two states, so must their tokens; `seen[0]` is from the engine's own load."""
    states = {tokens for tokens in seen[::2]}, {tokens for tokens in seen[1::2]}
    if any(len(state) != 1 for state in states) or states[0] & states[1]:
        raise CaseError(f"the engine's tokens do not follow its versions: {seen}")


def _tokens(client: VLLMClient) -> tuple[int, ...]:
    return tuple(client.complete(PROMPT, NUM_TOKENS, ignore_eos=True).token_ids)


@contextmanager
def _embedded(checkpoint: Path, address: str, folder: Path) -> Iterator[VLLMClient]:
    """The embedded `transformers` engine, which follows the publisher by itself."""
    command = [sys.executable, "-m", "weightcast.adapters.transformers.server", "--model", str(checkpoint)]
    command += ["--port", "0", "--publisher", address, "--engine", ENGINE]
    with _process(command, folder / "engine.log") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving "):
            raise CaseError(f"the embedded engine ended with {process.poll()}: {line}{_tail(folder / 'engine.log')}")
        with VLLMClient(line.split()[-1], timeout_s=DEADLINE_S) as client:
            yield client


@contextmanager
def _vllm(checkpoint: Path, address: str, folder: Path) -> Iterator[VLLMClient]:
    """A vLLM server and the driver beside it."""
    from weightcast.adapters.vllm.server import VLLMServer

    flags = ["--enforce-eager", "--skip-tokenizer-init"]
    log = folder / "vllm.log"
    with VLLMServer(checkpoint, log_path=log, dtype="bfloat16", max_model_len=256, arguments=flags) as server:
        command = [sys.executable, "-m", "weightcast.adapters.vllm.driver", "--engine", server.url]
        with _process([*command, "--publisher", address], folder / "driver.log"):
            yield server.client


@contextmanager
def _process(command: list[str], log_path: Path) -> Iterator["subprocess.Popen[str]"]:
    with log_path.open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def _tail(path: Path) -> str:
    return path.read_text()[-2000:]
