"""The processes of a demo: started with a log file each, watched, and ended on every way out.

Each child leads a process group of its own, so that ending it ends what it started (torchrun's ranks, vLLM's
engine core) too.

    with Processes(Path("out/logs")) as processes:
        engine = processes.start("engine", command)
        processes.check()
"""

import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from weightcast.sync.errors import PeerLost

TERMINATE_TIMEOUT_S = 15.0
# Below the ports that Linux gives to connections (net.ipv4.ip_local_port_range begins at 32768).
_FIRST_PORT, _NUM_PORTS = 15_000, 17_000
TAIL_LINES = 25
ERROR_PREFIX = "error: "  # how weightcast.trainer.pretrain begins the line that says why it ends
TORCHRUN_REPORT = "torch/distributed/elastic/multiprocessing/api.py"


@dataclass(frozen=True)
class Child:
    """One running process and the file that holds all it printed."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self.popen.poll() is None

    def lost(self) -> PeerLost:
        """The error that says how the process ended and why, as far as its log tells."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return PeerLost(f"{self.name} ended with {describe_exit(self.popen.returncode)}{describe_end(lines, self.log)}")


def describe_end(lines: Sequence[str], log: Path) -> str:
    """What to tell of a log of `lines`: the error that our own commands print, or else its last lines. Pure."""
    errors = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
    if errors:
        return f": {errors[-1]} (log: {log})"
    # torchrun follows a rank's traceback with a longer one of its own, which says nothing of the cause.
    end = next((number for number, line in enumerate(lines) if TORCHRUN_REPORT in line), len(lines))
    tail = "\n".join(lines[max(0, end - TAIL_LINES) : end])
    return f"; {log} ends with:\n{tail}"


class Processes:
    """The children of one run. Leaving the context ends them, the youngest first."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._children:
            self.stop(self._children[-1])

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
        """Start `command` with `env` on top of this process's environment. It reads nothing from the terminal."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                start_new_session=True,
            )
        child = Child(name, popen, log)
        self._children.append(child)
        return child

    def check(self, *, may_end: Child | None = None) -> None:
        """Raise PeerLost when a child has ended; `may_end` may do so with exit code 0."""
        for child in self._children:
            if not child.is_running() and not (child is may_end and child.popen.returncode == 0):
                raise child.lost()

    def stop(self, child: Child) -> None:
        """End a child and all that it started: politely, and after 15 seconds by force."""
        self._children.remove(child)
        if child.is_running():
            _signal_group(child, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):  # what does not end by itself is killed below
                child.popen.wait(TERMINATE_TIMEOUT_S)
        _signal_group(child, signal.SIGKILL)
        child.popen.wait()


def _signal_group(child: Child, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the group is empty: everything in it has ended
        os.killpg(child.popen.pid, number)


def describe_exit(code: int) -> str:
    """`exit code 1`, or the name of the signal that ended the process."""
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def find_free_port() -> int:
    """A loopback TCP port that nobody listens on now.

    Not one of those that the kernel gives away: any program's next connection might take it before it is used.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = _FIRST_PORT + secrets.randbelow(_NUM_PORTS)
            probe.bind(("127.0.0.1", port))
            return port
