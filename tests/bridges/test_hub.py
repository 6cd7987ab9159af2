"""Hub repositories: a download works, a gated one says what to do, and a folder asks no hub at all.

The hub is an HTTP server in this process that speaks the part of the hub's interface that the real client uses.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import transformers

from weightcast.bridges import AutoBridge
from weightcast.sync.errors import WeightcastError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED_STATUS = {"meta-llama/no-token": 401, "meta-llama/not-asked": 403}
LOAD = """
import sys
from weightcast.bridges import AutoBridge
try:
    bridge = AutoBridge.from_hf_pretrained(sys.argv[1])
    print(len(bridge.hf_checkpoint().specs), "tensors of", bridge.family.family)
except OSError as error:
    print(type(error).__name__, "|", error)
print("can handle:", AutoBridge.can_handle(sys.argv[1]))
"""


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with the repository `tiny/model` and gated ones; its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            asked.append(self.path)
            gated = next((status for name, status in GATED_STATUS.items() if name in self.path), None)
            if gated is not None:
                self.answer(gated, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            elif "/tree/" in self.path:
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in folder.iterdir()
                ]
                self.answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            elif self.path.startswith("/api/models/tiny/model"):
                names = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                body = json.dumps({"id": "tiny/model", "sha": COMMIT, "siblings": names}).encode()
                self.answer(200, body, {"Content-Type": "application/json"})
            elif (path := folder / self.path.rpartition("/")[2]).is_file():
                body = path.read_bytes()
                tag = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(body).hexdigest()}"'}
                self.answer(200, body, tag | {"X-Linked-Size": str(len(body))})
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

        do_GET = do_HEAD

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def load(name: str, endpoint: str, cache: Path) -> list[str]:
    """What a program says that opens `name`, by lines."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    env = {key: value for key, value in env.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, name], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_a_repository_is_downloaded(tiny_models: Path, tmp_path: Path) -> None:
    with hub(tiny_models / "qwen3") as (endpoint, asked):
        assert load("tiny/model", endpoint, tmp_path) == ["47 tensors of qwen3", "can handle: True"]
    assert any(path.endswith("model.safetensors.index.json") for path in asked)
    assert not any(path.endswith(".bin") for path in asked)


@pytest.mark.parametrize("name", GATED_STATUS)
def test_a_gated_repository_says_what_to_do(name: str, tiny_models: Path, tmp_path: Path) -> None:
    with hub(tiny_models / "qwen3") as (endpoint, _):
        said = "\n".join(load(name, endpoint, tmp_path))
    assert said.startswith(f"OSError | You are trying to access a gated repo: {name}. Make sure to have access to it")
    assert f"ask for it at https://huggingface.co/{name}," in said and "HF_TOKEN=<your_access_token>" in said
    assert "can handle: False" in said


def test_a_folder_asks_no_hub(tiny_models: Path, tmp_path: Path) -> None:
    with hub(tiny_models / "qwen3") as (endpoint, asked):
        assert load(str(tiny_models / "qwen3"), endpoint, tmp_path) == ["47 tensors of qwen3", "can handle: True"]
    assert asked == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen9", "architectures": ["Qwen9ForCausalLM"]}, "(model_type 'qwen9', written by 99.0.0)"),
        ({"model_type": "qwen3", "architectures": ["Qwen9ForCausalLM"]}, "no bridge for the architecture Qwen9"),
        ({"model_type": "qwen3", "rope_parameters": {"rope_type": "spiral"}}, "spiral"),
    ],
)
def test_a_configuration_of_a_newer_transformers(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    base = {"architectures": ["Qwen3ForCausalLM"], "transformers_version": "99.0.0"}
    (tmp_path / "config.json").write_text(json.dumps(base | fields))
    with pytest.raises(WeightcastError) as caught:
        AutoBridge.from_hf_pretrained(tmp_path).to_megatron_provider(load_weights=False)
    assert message in str(caught.value)
    if fields["model_type"] == "qwen9":
        assert f"transformers {transformers.__version__} cannot read" in str(caught.value)
        assert "install a newer transformers" in str(caught.value)
