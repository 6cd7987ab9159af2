"""A stand-in for an SGLang server, for tests and for trying an updater without a GPU: same routes, same receiving.

    python -m weightcast.adapters.sglang.conformance_server --port 30000 --tp-size 2 --admin-api-key secret

It answers the weight-update routes of SGLang 0.5.23 with their fields, refusals and status codes, and receives over
real process groups (`conformance_worker`). It has no model: `/generate` returns tokens that follow from the prompt and
from the bits of all tensors it holds, so that a wrong bit shows. Unknown fields are refused; SGLang ignores some.
"""

import argparse
import hmac
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import xxhash

from weightcast.sync.errors import EngineError

Answer = dict[str, Any]
# route -> the fields that it takes; those that it needs come first, up to the None
_FIELDS: dict[str, tuple[str | None, ...]] = {
    "init_weights_update_group": (
        *("master_address", "master_port", "rank_offset", "world_size", None),
        *("group_name", "backend"),
    ),
    "destroy_weights_update_group": (None, "group_name"),
    "begin_weight_update": (None, "selector"),
    "update_weights_from_distributed": (
        *("names", "dtypes", "shapes", None),
        *("group_name", "flush_cache", "abort_all_requests", "weight_version", "load_format", "selector"),
        "torch_empty_cache",
    ),
    "end_weight_update": (None,),
    "pause_generation": (None, "mode"),
    "continue_generation": (None, "torch_empty_cache"),
    "flush_cache": (None,),
    "update_weight_version": ("new_version", None, "abort_all_requests"),
    "weights_checker": ("action", None),
    "generate": ("input_ids", None, "sampling_params"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "init_weights_update_group": {"group_name": "weight_update_group", "backend": "nccl"},
    "destroy_weights_update_group": {"group_name": "weight_update_group"},
    "update_weights_from_distributed": {"group_name": "weight_update_group"},
}
_OPEN = ("generate",)  # guarded by --api-key in SGLang, not by the admin's


class Workers:
    """The tensor-parallel ranks, each a process; a command goes to all, and all must succeed."""

    def __init__(self, tp_size: int, seed: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "weightcast.adapters.sglang.conformance_worker"]
        self.processes = [
            subprocess.Popen(
                [*command, *map(str, (rank, tp_size, port, seed))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(tp_size)
        ]
        self._lock = threading.Lock()
        for process in self.processes:
            self._read(process)

    def ask(self, command: str, body: dict[str, Any]) -> list[Answer]:
        """Every rank's answer; one command after the other, as SGLang's scheduler works."""
        with self._lock:
            for process in self.processes:
                assert process.stdin is not None
                try:
                    process.stdin.write(json.dumps({"command": command, "body": body}) + "\n")
                    process.stdin.flush()
                except BrokenPipeError:
                    raise EngineError(f"a worker ended with {process.wait()}") from None
            return [self._read(process) for process in self.processes]

    @staticmethod
    def _read(process: "subprocess.Popen[str]") -> Answer:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise EngineError(f"a worker ended with {process.wait()}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End every worker, whatever it waits for."""
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()


class State:
    """What the server is about, apart from its workers."""

    def __init__(self, workers: Workers, admin_key: str | None) -> None:
        self.workers = workers
        self.admin_key = admin_key
        self.weight_version = "default"
        self.is_paused = False
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.routes: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "update_weights_from_distributed": self._update,
            "pause_generation": self._pause,
            "continue_generation": self._resume,
            "flush_cache": lambda body: {"success": True},
            "update_weight_version": self._label,
            "weights_checker": self._check_weights,
            "generate": self._generate,
        }

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Answer]:
        """Status and answer for a POST."""
        allowed = _FIELDS.get(route)
        if allowed is None:
            return 404, {"detail": "Not Found"}
        needed = allowed[: allowed.index(None)]
        if missing := [name for name in needed if name not in body]:
            return 422, {"error": f"fields {missing} are missing"}
        if unknown := [name for name in body if name not in allowed]:
            return 422, {"error": f"unknown fields {unknown}"}
        self.log.append((route, body))
        body = _DEFAULTS.get(route, {}) | body
        answer = self.routes[route](body) if route in self.routes else self._ask_workers(route, body)
        return (200 if answer.get("success", True) else 400), answer

    def _ask_workers(self, route: str, body: dict[str, Any]) -> Answer:
        answers = self.workers.ask(route, body)
        message = " | ".join(dict.fromkeys(answer["message"] for answer in answers))
        return {"success": all(answer["success"] for answer in answers), "message": message}

    def _update(self, body: dict[str, Any]) -> Answer:
        answer = self._ask_workers("update_weights_from_distributed", body)
        if answer["success"] and body.get("weight_version") is not None:
            self.weight_version = body["weight_version"]
        return answer

    def _pause(self, body: dict[str, Any]) -> Answer:
        if body.get("mode", "abort") not in ("abort", "retract", "in_place"):
            return {"success": False, "message": f"unknown mode {body['mode']!r}"}
        self.is_paused = True
        return {"message": "Generation paused successfully.", "status": "ok"}

    def _resume(self, body: dict[str, Any]) -> Answer:
        self.is_paused = False
        return {"message": "Generation continued successfully.", "status": "ok"}

    def _label(self, body: dict[str, Any]) -> Answer:
        self.weight_version = body["new_version"]
        return {"success": True, "message": f"Weight version updated to {self.weight_version}"}

    def _checksums(self) -> list[dict[str, str]]:
        return [answer["checksums"] for answer in self.workers.ask("weights_checker", {})]

    def _check_weights(self, body: dict[str, Any]) -> Answer:
        return {"success": True, "ranks": self._checksums()}

    def _generate(self, body: dict[str, Any]) -> Answer:
        if self.is_paused:
            return {"success": False, "message": "the stand-in does not hold requests while it is paused"}
        count = int(body.get("sampling_params", {}).get("max_new_tokens", 16))
        digest = xxhash.xxh3_64_intdigest(json.dumps([body["input_ids"], self._checksums()]).encode())
        tokens = [xxhash.xxh3_64_intdigest(f"{digest}/{index}".encode()) % 1000 for index in range(count)]
        meta = {"finish_reason": {"type": "length", "length": count}, "weight_version": self.weight_version}
        return {"output_ids": tokens, "meta_info": meta}


def make_handler(state: State) -> type[BaseHTTPRequestHandler]:
    """The HTTP side: JSON in, JSON out."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            route = self.path.strip("/").partition("?")[0]
            if route == "health":
                self._send(200, {})
            elif route == "model_info":
                self._send(200, {"model_path": "none", "weight_version": state.weight_version})
            else:
                self._send(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            route = self.path.strip("/").partition("?")[0]
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = self.headers.get("Authorization", "")
            key = state.admin_key
            if key is not None and route not in _OPEN and not hmac.compare_digest(given, f"Bearer {key}"):
                self._send(401, {"error": "Unauthorized"})
                return
            try:
                self._send(*state.answer(route, json.loads(raw) if raw else {}))
            except EngineError as error:
                self._send(500, {"error": str(error)})

        def _send(self, status: int, answer: Answer) -> None:
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler


class ConformanceServer:
    """The stand-in in a thread of this process, its workers in processes; `port` 0 takes a free one."""

    def __init__(self, *, port: int = 0, tp_size: int = 1, admin_key: str | None = None, seed: int = 0) -> None:
        self.state = State(Workers(tp_size, seed), admin_key)
        self._http = ThreadingHTTPServer(("127.0.0.1", port), make_handler(self.state))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> "ConformanceServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and stop answering."""
        self.state.workers.close()
        self._http.shutdown()
        self._http.server_close()

    def wait(self) -> None:
        """Until the server is closed."""
        self._thread.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m weightcast.adapters.sglang.conformance_server", description=__doc__
    )
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--admin-api-key")
    args = parser.parse_args(arguments)
    with ConformanceServer(port=args.port, tp_size=args.tp_size, admin_key=args.admin_api_key) as server:
        print(server.url, flush=True)
        server.wait()


if __name__ == "__main__":
    main()
