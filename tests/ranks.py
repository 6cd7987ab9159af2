"""Runs a test's function in several processes, as torchrun would.

Each rank is a process with torchrun's environment variables and, unless told otherwise, a gloo process group. Importing
torch and Megatron takes longer than most tests, so ranks are forked from one process that has imported them; with
FRESH_RANKS=1 (as `make test-all` has it) each is a Python of its own, and no two hash strings alike.
The function must sit at the top of its module; what it is given and what it returns must be JSON. A rank that fails
ends the others, and its traceback becomes the test's failure; a rank that hangs says where.

    def double(rank_in_words: str, times: int) -> int:
        return dist.get_rank() * times

    def test_double() -> None:
        assert run_ranks(double, 2, "one", times=2) == [0, 2]
"""

import faulthandler
import importlib
import json
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent
POLL_INTERVAL_S = 0.05
REPORT_CHARACTERS = 6000
# In this order: weightcast quiets what Megatron says on import.
IMPORTED_ONCE = ("torch.distributed", "weightcast.bridges", "transformers.models.auto.modeling_auto", "pytest")


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    process_group: bool = True,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """`function(*args, **kwargs)` on `world_size` ranks; what each returned, by rank. Fails the test otherwise.

    `process_group=False` leaves the making of a process group to `function`.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = {
            "module": function.__module__,
            "function": function.__qualname__,
            "args": args,
            "kwargs": kwargs,
            "timeout_s": timeout_s,
            "process_group": process_group,
        }
        Path(folder, "job.json").write_text(json.dumps(job))
        _run_all(world_size, Path(folder), timeout_s, env or {})
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def find_free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago.

    Not one of those that the kernel gives away: a subscriber that waits for a publisher connects again and again, and
    now and then is given the very port that it connects to, which is then taken.
    """
    while True:
        with socket.socket() as listener, suppress(OSError):
            port = 15_000 + secrets.randbelow(17_000)
            listener.bind(("127.0.0.1", port))
            return port


def _run_all(world_size: int, folder: Path, timeout_s: float, extra_env: dict[str, str]) -> None:
    env = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    start = _start_fresh if os.environ.get("FRESH_RANKS") == "1" else _fork
    ranks: list[Rank] = []
    try:
        for rank in range(world_size):
            ranks.append(start(folder, rank, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | extra_env))
        _wait(ranks, folder, timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


class Rank(Protocol):
    """A process; `subprocess.Popen` is one."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> Any: ...


def _start_fresh(folder: Path, rank: int, env: dict[str, str]) -> Rank:
    with open(folder / f"{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(folder)],
            env=os.environ | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )


class _Forked:
    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _fork(folder: Path, rank: int, env: dict[str, str]) -> Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))  # does nothing once the server runs
    return _Forked(context.Process(target=_enter, args=(str(folder), rank, os.environ | env)))


def _enter(folder: str, rank: int, env: dict[str, str]) -> None:
    """The beginning of a forked rank: what a fresh process would have been given."""
    with open(Path(folder) / f"{rank}.log", "wb", buffering=0) as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    os.chdir(folder)
    _run_one(Path(folder))


def _wait(ranks: list[Rank], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in ranks]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            # A rank that lost its peer fails too: leave the first cause a moment to be written.
            time.sleep(0.5)
            raise AssertionError("\n".join(_report(rank, folder) for rank in failed))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline + 5:
            waiting = [rank for rank, code in enumerate(codes) if code is None]
            raise AssertionError(f"after {timeout_s} s\n" + "\n".join(_report(rank, folder) for rank in waiting))
        time.sleep(POLL_INTERVAL_S)


def _report(rank: int, folder: Path) -> str:
    text = (folder / f"{rank}.log").read_text(errors="replace")
    return f"--- rank {rank} ---\n{text[-REPORT_CHARACTERS:]}"


def _run_one(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    faulthandler.dump_traceback_later(job["timeout_s"], exit=True)
    import torch.distributed as dist

    function = importlib.import_module(job["module"])
    for name in job["function"].split("."):
        function = getattr(function, name)
    if job["process_group"]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=job["timeout_s"]))
    result = function(*job["args"], **job["kwargs"])  # type: ignore[operator]
    rank = os.environ["RANK"]
    (folder / f"{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    _run_one(Path(sys.argv[1]))
