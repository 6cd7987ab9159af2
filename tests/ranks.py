"""Runs a test's function in several processes, as torchrun would.

Each rank is a fresh Python with torchrun's environment variables and, unless told otherwise, a gloo process group.
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
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
POLL_INTERVAL_S = 0.05
REPORT_CHARACTERS = 6000


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
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _run_all(world_size: int, folder: Path, timeout_s: float, extra_env: dict[str, str]) -> None:
    env = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world_size):
            with open(folder / f"{rank}.log", "wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, str(Path(__file__)), str(folder)],
                        env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | extra_env,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                    )
                )
        _wait(ranks, folder, timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
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
