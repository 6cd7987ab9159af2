"""Gloo in buckets against gloo by parameter: a model of experts, 20,000 tensors, one source and one engine.

python tests/benchmarks/collective_case.py [--tiny] [--rounds 5]

By parameter is what frameworks do that broadcast from rank 0: `torch.distributed.broadcast` of one tensor after the
other, straight from and into the tensors, nothing checked. In buckets is `CollectiveSource.broadcast`: packed from the
live tensors, sent, each chunk's hash checked, put into the tensors, each tensor's digest checked, and confirmed. Each
round runs both, in the same two processes; the engine then compares every bit with what the source has.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from weightcast.sync import HeldRegion, TensorSpec
from weightcast.sync.transports.collective_source import CollectiveSource
from weightcast.sync.transports.collective_target import CollectiveReceiver

ENGINE = "engine-0"
TIMEOUT_S = 120.0
CHUNK_BYTES = 4 << 20


def moe_specs(tiny: bool = False) -> list[TensorSpec]:
    """128 experts of three matrices in each of 52 layers, and the rest of the layer: 20,020 tensors, 1.17 GB bf16.

    Qwen3-30B-A3B has as many tensors (18,867); the matrices are smaller here, so that the model fits.
    """
    hidden, intermediate, layers = 192, 144, 1 if tiny else 52
    rows: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (2048, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        rows.append((f"{prefix}mlp.gate.weight", (128, hidden)))
        for expert in range(128):
            rows += [
                (f"{prefix}mlp.experts.{expert}.gate_proj.weight", (intermediate, hidden)),
                (f"{prefix}mlp.experts.{expert}.up_proj.weight", (intermediate, hidden)),
                (f"{prefix}mlp.experts.{expert}.down_proj.weight", (hidden, intermediate)),
            ]
    rows.append(("model.norm.weight", (hidden,)))
    return [TensorSpec(name, torch.bfloat16, shape) for name, shape in rows]


def make_tensors(specs: list[TensorSpec], seed: int) -> dict[str, torch.Tensor]:
    """Random bits, in memory that has been touched."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randint(-(2**15), 2**15, spec.shape, dtype=torch.int16, generator=generator).view(spec.dtype)
        for spec in specs
    }


def sum_bits(tensors: dict[str, torch.Tensor]) -> int:
    """The sum of all elements' bits, each tensor's times its place."""
    rows = enumerate(tensors.values(), 1)
    return sum(index * int(tensor.view(torch.int16).sum(dtype=torch.int64)) for index, tensor in rows)


class TrainerSide:
    """Every tensor whole, on one rank."""

    rank, world_size = 0, 1

    def __init__(self, specs: list[TensorSpec], tensors: dict[str, torch.Tensor]) -> None:
        self._specs = specs
        self._tensors = tensors

    def specs(self) -> list[TensorSpec]:
        """The model's tensors."""
        return self._specs

    def held(self) -> list[HeldRegion]:
        """All of them."""
        return [HeldRegion(spec.whole(), partial(self._tensors.__getitem__, spec.name)) for spec in self._specs]


def broadcast_each(tensors: dict[str, torch.Tensor]) -> float:
    """Seconds for one broadcast a parameter, both ranks there when it begins and done when it ends."""
    dist.barrier()
    start_s = time.perf_counter()
    for tensor in tensors.values():
        dist.broadcast(tensor, 0)
    dist.barrier()
    return time.perf_counter() - start_s


def run_trainer(rounds: int, specs: list[TensorSpec], port: int, address: str) -> tuple[float, float]:
    """Both ways in each round; medians of the seconds in buckets and by parameter."""
    tensors = make_tensors(specs, 1)
    times_s: dict[str, list[float]] = {"buckets": [], "parameters": []}
    with CollectiveSource(
        TrainerSide(specs, tensors), address, engines=(ENGINE,), chunk_bytes=CHUNK_BYTES, timeout_s=TIMEOUT_S
    ) as source:
        print(json.dumps({"address": source.address}), flush=True)
        _join(0, port)
        source.connect()
        for number in range(rounds + 1):
            for tensor in tensors.values():
                tensor.view(torch.int16).add_(1)
            by_parameter_s = broadcast_each(tensors)
            _compare(tensors, "by parameter")
            for tensor in tensors.values():
                tensor.view(torch.int16).add_(3)
            dist.barrier()
            start_s = time.perf_counter()
            source.broadcast(number + 1)
            in_buckets_s = time.perf_counter() - start_s
            _compare(tensors, "in buckets")
            if number:  # the first round faults memory in, and makes the tables of digests
                times_s["parameters"].append(by_parameter_s)
                times_s["buckets"].append(in_buckets_s)
    return statistics.median(times_s["buckets"]), statistics.median(times_s["parameters"])


def run_engine(rounds: int, specs: list[TensorSpec], port: int, address: str) -> None:
    """The other end."""
    tensors = make_tensors(specs, 2)
    with CollectiveReceiver(address, ENGINE, expect=specs, timeout_s=TIMEOUT_S) as receiver:
        _join(1, port)
        receiver.connect()
        for _ in range(rounds + 1):
            broadcast_each(tensors)
            _compare(tensors, "by parameter")
            dist.barrier()
            receiver.receive(into=tensors)
            _compare(tensors, "in buckets")


def _join(rank: int, port: int) -> None:
    limit = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit)


def _compare(tensors: dict[str, torch.Tensor], how: str) -> None:
    """Both ranks' bits, summed, must be the same."""
    mine = torch.tensor([sum_bits(tensors)])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    if not torch.equal(mine, theirs):
        raise SystemExit(f"{how}: what came is not what was sent")


def measure(rounds: int = 5, tiny: bool = False) -> tuple[float, float]:
    """Median seconds of `rounds`, one version in buckets and by parameter: (value_s, baseline_s)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), "--rounds", str(rounds), "--port", str(port)]
    command += ["--tiny"] if tiny else []
    trainer = subprocess.Popen([*command, "--role", "trainer"], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    address = json.loads(trainer.stdout.readline())["address"]
    engine = subprocess.Popen([*command, "--role", "engine", "--address", address], env=environment)
    try:
        answer = trainer.stdout.readline()
        if not answer or engine.wait(TIMEOUT_S) or trainer.wait(TIMEOUT_S):
            raise SystemExit("a benchmark process ended with an error; it is above")
    finally:
        for process in (trainer, engine):
            process.kill()
            process.wait()
    value_s, baseline_s = json.loads(answer)["seconds"]
    return value_s, baseline_s


def main() -> None:
    """The whole case, or one of its two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="386 tensors: to try the program, not for figures")
    parser.add_argument("--role", choices=("trainer", "engine"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", default="tcp://127.0.0.1:0", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    specs = moe_specs(options.tiny)
    if options.role == "trainer":
        print(json.dumps({"seconds": run_trainer(options.rounds, specs, options.port, options.address)}), flush=True)
    elif options.role == "engine":
        run_engine(options.rounds, specs, options.port, options.address)
    else:
        value_s, baseline_s = measure(options.rounds, options.tiny)
        num_bytes = sum(spec.num_bytes for spec in specs)
        print(
            f"{len(specs)} tensors, {num_bytes / 1e9:.2f} GB: in buckets {value_s:.2f} s, "
            f"by parameter {baseline_s:.2f} s, ratio {baseline_s / value_s:.1f}"
        )


if __name__ == "__main__":
    main()
