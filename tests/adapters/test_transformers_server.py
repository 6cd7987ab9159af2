"""The embedded engine as a process: its routes, and the conformance kit over HTTP."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.adapters.conftest import Checkpoint, embedded_server, free_port
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens
from tests.adapters.trainer_side import ServerUnderTest
from transformers import AutoTokenizer

import weightcast
from weightcast.adapters.conformance import run_conformance
from weightcast.adapters.engine import INITIAL_LABEL
from weightcast.adapters.transformers.server import bind
from weightcast.adapters.vllm.client import VLLMClient
from weightcast.sync.errors import AddressError, EngineError


@pytest.fixture(scope="module")
def server(first: Checkpoint) -> Iterator[VLLMClient]:
    with embedded_server(first.folder) as client:
        yield client


def post(client: VLLMClient, route: str, body: Any) -> httpx.Response:
    return httpx.post(client.url + route, json=body, trust_env=False, timeout=30)


def test_text_and_token_ids_give_the_same_answer(server: VLLMClient, first: Checkpoint) -> None:
    text = "import this"
    prompt = AutoTokenizer.from_pretrained(first.folder)(text)["input_ids"]
    by_text = post(server, "/v1/completions", {"prompt": text, "max_tokens": NUM_TOKENS}).json()
    by_ids = post(server, "/v1/completions", {"prompt": prompt, "max_tokens": NUM_TOKENS}).json()
    assert len(text) == len(prompt) == by_text["usage"]["prompt_tokens"]
    assert by_text["weight_version"] == INITIAL_LABEL
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"] != ""
    assert len(by_ids["choices"][0]["token_ids"]) == by_ids["usage"]["completion_tokens"] == NUM_TOKENS
    assert tuple(server.complete(PROMPT, NUM_TOKENS).token_ids) == greedy_tokens(first.model)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": []}, "prompt must be text or a list of token ids"),
        ({"prompt": [256]}, "every id of prompt must be an integer from 0 to 255, got 256"),
        ({"prompt": [True]}, "got True"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be an integer from 1"),
        ({"prompt": "a", "temperature": -1}, "temperature must be a number >= 0"),
        ({"prompt": "a", "top_p": 0.5}, "top_p: not supported"),
        ({"prompt": "a", "n": 2}, "n must be 1"),
        ({"prompt": "a", "model": "another"}, "asked for 'another'"),
        ([], "the body must be a JSON object"),
    ],
)
def test_a_request_that_cannot_be_met_is_explained(server: VLLMClient, body: Any, message: str) -> None:
    response = post(server, "/v1/completions", body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_pause_and_resume(server: VLLMClient) -> None:
    assert not server.is_paused()
    server.pause("keep", timeout_s=10)
    assert server.is_paused()
    assert server.is_healthy()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json={"prompt": "a"}, timeout=0.3, trust_env=False)
    server.resume()
    assert len(server.complete("a", 3).token_ids) == 3
    response = httpx.post(server.url + "/pause?mode=stop", trust_env=False)
    assert (response.status_code, "choose one of abort, wait, keep" in response.text) == (400, True)


def test_the_status_page(server: VLLMClient) -> None:
    status = httpx.get(server.url + "/version", trust_env=False).json()
    assert status == {
        "version": weightcast.__version__,
        "engine": "transformers",
        "weight_version": INITIAL_LABEL,
        "is_paused": False,
        "num_running": 0,
    }


def test_conformance(first: Checkpoint, second: Checkpoint, tmp_path: Path) -> None:
    address, events = f"tcp://127.0.0.1:{free_port()}", tmp_path / "events.jsonl"
    with embedded_server(first.folder, "--publisher", address, "--events", str(events)) as client:
        engine = ServerUnderTest(client, address, members=1)
        tokens = greedy_tokens(second.model)
        run_conformance(engine, first.tensors, second.tensors, fresh_tokens=tokens, prompt=PROMPT)
        status = httpx.get(client.url + "/version", trust_env=False).json()
    assert (status["num_updates"], status["phase"]) == (2, "serving")
    phases = [json.loads(line)["phase"] for line in events.read_text().splitlines()]
    assert (phases.count("load"), phases.count("stage")) == (2, 2)  # what was refused was not even sent


def test_an_operators_pause_outlasts_an_update(first: Checkpoint, second: Checkpoint) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with embedded_server(first.folder, "--publisher", address) as client:
        client.pause("abort", timeout_s=10)
        ServerUnderTest(client, address, members=1).offer(second.tensors)
        assert client.weight_version() != INITIAL_LABEL
        assert client.is_paused()
        client.resume()
        assert client.complete(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(second.model)


def test_a_port_in_use_is_said_before_the_model_is_loaded(first: Checkpoint) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another port"):
            bind("127.0.0.1", port)


def test_a_folder_without_a_tokenizer_takes_token_ids_only(first: Checkpoint, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(first.folder / name)
    with embedded_server(tmp_path, "--engine", "bare") as client:
        assert client.model_name() == "bare"
        assert client.complete(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(first.model)
        with pytest.raises(EngineError, match="send the prompt as token ids"):
            client.complete("text", 1)


def test_sigterm_ends_the_process(first: Checkpoint) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "weightcast.adapters.transformers.server", "--model", str(first.folder)]
    command += ["--port", "0", "--publisher", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving ")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
