"""An engine in a process of its own: it follows a publisher, and says the hash of each tensor of every version.

    python -m tests.gpu.engine '{"address": ..., "engine": ..., "transport": ..., "versions": 3}'

Started by `following`, whose `Engine` reads what it says. With `"collective": true` it receives one broadcast instead.
With `into`, the dtype and shape of each tensor, versions land in tensors of its own on `device`: columns of wider ones.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xxhash

from weightcast.sync import Limits, WeightSubscriber
from weightcast.sync.regions import DTYPES
from weightcast.sync.transports.collective import receive_version

TIMEOUT_S = 60.0


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """xxh3-128 of each tensor's bytes; nothing of weightcast's own checksums is trusted."""
    return {name: hash_tensor(tensor) for name, tensor in tensors}


def hash_tensor(tensor: torch.Tensor) -> str:
    """Of the bytes, in C order."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_hexdigest(raw.data)


class Engine:
    """The parent's side of such a process."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.name = str(settings["engine"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.engine", json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )

    def hear(self) -> dict[str, Any]:
        """The next thing that it says; what it says last before it dies is on the check's log."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"engine {self.name} ended with status {self.process.wait(10)}; see the log")
        said: dict[str, Any] = json.loads(line)
        return said


@contextmanager
def following(*engines: Mapping[str, Any]) -> Iterator[list[Engine]]:
    """Run engines for as long as the block lasts."""
    running = [Engine(settings) for settings in engines]
    try:
        yield running
    finally:
        for engine in running:
            engine.process.kill()
            engine.process.wait()


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def make_own(shapes: Mapping[str, tuple[str, Sequence[int]]], device: str) -> dict[str, torch.Tensor]:
    """Tensors as an engine has them: those of rows are columns of a parameter that is wider by 16 elements."""
    into = {}
    for name, (dtype, shape) in shapes.items():
        if len(shape) == 2:
            into[name] = torch.zeros((shape[0], shape[1] + 16), dtype=DTYPES[dtype], device=device)[:, 16:]
        else:
            into[name] = torch.zeros(tuple(shape), dtype=DTYPES[dtype], device=device)
    return into


def _follow(settings: Mapping[str, Any]) -> None:
    limits = Limits(lost_after_s=TIMEOUT_S)
    options = {name: settings[name] for name in ("transport", "device") if name in settings}
    if "into" in settings:
        options["into"] = make_own(settings["into"], options["device"])
    with WeightSubscriber(settings["address"], engine=settings["engine"], limits=limits, **options) as subscriber:
        for _ in range(settings["versions"]):
            update = subscriber.wait(TIMEOUT_S)
            hashes = hash_tensors(update)
            places = sorted({tensor.device.type for _, tensor in update})
            update.commit()
            _say(version=update.version.number, transport=update.stats.transport, hashes=hashes, places=places)


def main() -> None:
    """Do what the one argument says."""
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    if settings.get("collective"):
        update = receive_version(settings["address"], settings["engine"], timeout_s=TIMEOUT_S)
        _say(version=update.version.number, hashes=hash_tensors(update.tensors.items()))
    else:
        _follow(settings)


if __name__ == "__main__":
    main()
