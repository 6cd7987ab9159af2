"""One end of a benchmark: a process that sends or receives a model by the means of one module, when stdin says so.

    python tests/benchmarks/peer_process.py '{"mover": "baselines.sockets", "role": "sender", "model": "tiny"}'

A *mover* is a module with `open_sender(state, options)` and `open_receiver(specs, address, options)`; what these
return is written down below. Weightcast's own mover and every baseline have this one form, so all are timed alike:
from just before `send` in the sender to the end of `receive` in the receiver. `time.monotonic` is one clock for all
processes of a machine.

Answers are JSON lines on stdout. Commands are JSON lines on stdin, `{"do": ...}`, in this order:

| command | sender | receiver |
|---|---|---|
| (start) | builds the model, answers `{"address": ...}` | |
| `open` | `connect()`: both ends meet | builds its side, given `address` |
| `step` | changes the weights | |
| `move` | `send(number)` | answers once, then `receive(number)`, then `finish()` |
| `hash` | of the bits that it holds | of the bits that it holds |
| `check` | | seconds by which digests lengthen the copies of all that it holds, one thread |
| `copy` | seconds of a copy of the model within the process, one thread | |
An answer to `move` also says `extra_bytes`: the peak of resident memory during the move, less what was there before
the side was opened.
"""

import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from model_state import ModelState, allocate, hash_bits
from shapes import MODELS

from weightcast.sync import Region, TensorSpec
from weightcast.sync.digest import copy_with_digest

CHUNK_BYTES = 4 << 20


class Sender(Protocol):
    """A trainer's side."""

    address: str

    def connect(self) -> None:
        """Meet the receivers; what later moves need is set up when this returns."""
        ...

    def send(self, number: int) -> dict[str, Any]:
        """Send the weights as they are; figures of one's own may be answered."""
        ...

    def close(self) -> None:
        """End."""
        ...


class Receiver(Protocol):
    """An engine's side. `tensors` are its own memory, by name; they are complete when `receive` returns."""

    tensors: Mapping[str, torch.Tensor]

    def receive(self, number: int) -> dict[str, Any]:
        """Take what the sender sends; figures of one's own may be answered."""
        ...

    def finish(self) -> None:
        """What is to be done after the clock was read."""
        ...

    def close(self) -> None:
        """End."""
        ...


def answer(**fields: Any) -> None:
    """One line for the bench."""
    print(json.dumps(fields), flush=True)


def run_sender(mover: Any, settings: dict[str, Any]) -> None:
    """Serve commands until stdin ends."""
    options = settings.get("options", {})
    state = ModelState(MODELS[settings["model"]](), **settings.get("state", {}))
    base_bytes = read_bytes("VmRSS")
    side: Sender = mover.open_sender(state, options)
    answer(address=side.address)
    spare: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "open":
                side.connect()
                answer()
            case "step":
                state.step()
                synchronize()
                answer()
            case "move":
                forget_peak()
                start_s = time.monotonic()
                details = side.send(command["number"])
                end_s = time.monotonic()
                answer(start_s=start_s, end_s=end_s, extra_bytes=read_bytes("VmHWM") - base_bytes, **details)
            case "hash":
                answer(hash=hash_bits(state.tensors[spec.name] for spec in state.specs()))
            case "copy":
                spare = spare or allocate(state.specs(), settings.get("state", {}).get("device", "cpu"))
                answer(copy_s=time_copy(state.tensors, spare))
    side.close()


def run_receiver(mover: Any, settings: dict[str, Any]) -> None:
    """Serve commands until stdin ends."""
    specs = MODELS[settings["model"]]()
    base_bytes = read_bytes("VmRSS")
    side: Receiver | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "open":
            side = mover.open_receiver(specs, command["address"], settings.get("options", {}))
            answer()
            continue
        assert side is not None, "a receiver is opened first"
        match command["do"]:
            case "move":
                forget_peak()
                answer()
                details = side.receive(command["number"])
                end_s = time.monotonic()
                side.finish()
                answer(end_s=end_s, extra_bytes=read_bytes("VmHWM") - base_bytes, **details)
            case "hash":
                answer(hash=hash_bits(side.tensors[spec.name] for spec in specs))
            case "check":
                answer(check_s=time_checks(specs, side.tensors))
    if side is not None:
        side.close()


def time_copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> float:
    """Seconds to copy a model, tensor by tensor, with one thread of this process (or on its device)."""
    synchronize()
    start_s = time.monotonic()
    for name, tensor in source.items():
        target[name].copy_(tensor)
    synchronize()
    return time.monotonic() - start_s


def time_checks(specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor]) -> float:
    """Seconds by which digests lengthen the copies of all that is held, 4 MiB by 4 MiB out of a buffer in the cache."""
    target = torch.zeros(max(CHUNK_BYTES, max(spec.num_bytes for spec in specs)), dtype=torch.uint8)
    scratch = torch.zeros(CHUNK_BYTES, dtype=torch.uint8)
    plain_s = digested_s = 0.0
    end = 0
    for spec in specs:
        raw = tensors[spec.name].view(-1).view(torch.uint8)
        for start in range(0, len(raw), CHUNK_BYTES):
            chunk = scratch[: min(CHUNK_BYTES, len(raw) - start)].copy_(raw[start : start + CHUNK_BYTES])
            for digests in (False, True):
                end = end + len(chunk) if end + len(chunk) <= len(target) else len(chunk)
                place = target[end - len(chunk) : end]
                start_s = time.monotonic()
                if digests:
                    copy_with_digest(place, chunk, Region(spec.name, (start,), (len(chunk),)))
                    digested_s += time.monotonic() - start_s
                else:
                    place.copy_(chunk)
                    plain_s += time.monotonic() - start_s
    return max(0.0, digested_s - plain_s)


def synchronize() -> None:
    """Wait for a GPU's work, where there is one in use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> None:
    """From here on `VmHWM` is the peak of what follows."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def read_bytes(field: str) -> int:
    """A field of this process's status: `VmRSS`, what is resident now, or `VmHWM`, its peak; shared pages included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Run the side that the one argument describes."""
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    mover = importlib.import_module(settings["mover"])
    {"sender": run_sender, "receiver": run_receiver}[settings["role"]](mover, settings)


if __name__ == "__main__":
    main()
