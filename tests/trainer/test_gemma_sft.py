"""Fine-tuning of the real Gemma 3 270M on real questions and answers, by the example that a user would start from.

On two ranks (TP2, bf16) the loss on held-out records falls, and the exported folder answers in a real vLLM: asked as a
chat, by the template in it, it says what transformers says of the folder, and ends where that ends.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from tests.assets.instructions import write_instructions
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightcast.adapters.vllm.server import VLLMServer
from weightcast.trainer.recipes.gemma.gemma3_270m import CHAT_TEMPLATE

pytestmark = [pytest.mark.long, pytest.mark.vllm, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_gemma.py"
TIMEOUT_S = 1500
MAX_TOKENS = 32
END_OF_TURN = 106
QUESTIONS = ("What is the capital of France?", "can you write bubble sort in Python?")


@dataclass(frozen=True)
class Trained:
    """The example's run."""

    folder: Path
    losses: dict[int, float]
    """Held-out loss by the steps before it."""


def finetune(gemma: Path, folder: Path, *flags: str) -> Trained:
    """The example as its docstring says it is run."""
    training, held_out = write_instructions(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    command += [str(gemma), str(training), str(held_out), str(folder / "out"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder)}  # tokens are cached in the home folder
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    found = re.findall(r"after (\d+) steps: held-out loss ([\d.]+) of", done.stdout)
    return Trained(folder / "out", {int(step): float(loss) for step, loss in found})


@pytest.mark.timeout(TIMEOUT_S + 600)
def test_fine_tuning_lowers_held_out_loss_and_the_folder_answers_in_vllm(gemma_270m: Path, tmp_path: Path) -> None:
    trained = finetune(gemma_270m, tmp_path)
    assert list(trained.losses) == [0, 12, 24]
    before, half_way, after = trained.losses.values()
    assert after < half_way < before
    assert after < 0.8 * before

    assert (trained.folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert json.loads((trained.folder / "generation_config.json").read_text())["eos_token_id"] == [1, END_OF_TURN]
    expected = {question: answer_of_transformers(trained.folder, question) for question in QUESTIONS}
    log, eager = tmp_path / "vllm.log", ["--enforce-eager"]
    with VLLMServer(trained.folder, log_path=log, dtype="float32", max_model_len=256, arguments=eager) as server:
        answers = {question: ask(server.url, question) for question in QUESTIONS}
    print(answers)
    assert answers == expected


@pytest.mark.timeout(TIMEOUT_S)
def test_adapters_lower_held_out_loss_too(gemma_270m: Path, tmp_path: Path) -> None:
    losses = finetune(gemma_270m, tmp_path, "--lora", "--steps", "12").losses
    assert list(losses) == [0, 6, 12]
    assert losses[12] < 0.8 * losses[0]


def answer_of_transformers(folder: Path, question: str) -> tuple[str, str]:
    """The greedy answer of transformers' own model and template, and why it ended, as vLLM would say it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    ended = int(tokens[-1]) in model.generation_config.eos_token_id
    return tokenizer.decode(tokens, skip_special_tokens=True), "stop" if ended else "length"


def ask(url: str, question: str) -> tuple[str, str]:
    """vLLM's greedy answer to a chat of one question, and why it ended."""
    model = httpx.get(f"{url}/v1/models", trust_env=False).raise_for_status().json()["data"][0]["id"]
    body = {"model": model, "temperature": 0, "max_tokens": MAX_TOKENS}
    body |= {"messages": [{"role": "user", "content": question}]}
    found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    choice = found.raise_for_status().json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]
