"""What every benchmark case needs: records, the publishing process, and the plain copy to compare with."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Record:
    """One line of the results: `ratio` is `value / baseline_value`, both in `unit`."""

    case: str
    value: float
    unit: str
    baseline: str
    baseline_value: float
    ratio: float
    rounds: int
    note: str = ""


class Publisher:
    """The publishing process and its pipes."""

    def __init__(self, addresses: list[str], tiny: bool) -> None:
        command = [sys.executable, str(HERE / "publishing_process.py"), *addresses]
        command += ["--tiny"] if tiny else []
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.addresses: list[str] = self.read()["addresses"]

    def read(self) -> dict[str, Any]:
        """The answer to the command sent last."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the publishing process ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send(self, command: str, index: int, number: int) -> None:
        """A command for the publisher on the address `index`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command} {index} {number}\n")
        self.process.stdin.flush()


@contextmanager
def running_publisher(addresses: list[str], tiny: bool = False) -> Iterator[Publisher]:
    """A publishing process that ends with the block."""
    publisher = Publisher(addresses, tiny)
    try:
        yield publisher
    finally:
        assert publisher.process.stdin is not None
        publisher.process.stdin.close()
        publisher.process.wait(30)


def time_copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> float:
    """Seconds to copy the model, tensor by tensor, with one thread."""
    start_s = time.perf_counter()
    for a, b in zip(source, target, strict=True):
        b.copy_(a)
    return time.perf_counter() - start_s
