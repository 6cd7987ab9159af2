"""The benchmark: how long a version of a 1 GB model takes into an engine's staging memory, against a plain copy.

make bench        or        python tests/benchmarks/bench.py [--rounds 5] [--out tests/benchmarks/results/cpu.json]

The trainer's stand-in is another process; every round runs each case once, interleaved with its baseline, a
one-thread copy of the same tensors inside this process. Figures are medians over the rounds; a ratio compares within
the run only. What was staged is compared with what was published, bit sums against bit sums, in every round.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import zmq
from delta_codec import run_codec
from digest import run_digest
from engine_pause import run_pause
from harness import TIMEOUT_S, Record, running_publisher, time_copy
from rich.console import Console
from rich.table import Table
from shapes import TINY, qwen3_specs
from shared_memory import run_shared_memory

import weightcast
from weightcast.sync import TensorSpec, Update, WeightSubscriber

HERE = Path(__file__).parent


def sum_bits(update: Update) -> int:
    """The sum of all elements' bits, as the publishing process computes it."""
    return sum(int(tensor.view(torch.int16).sum(dtype=torch.int64)) for _, tensor in update)


def run_staging(rounds: int, specs: list[TensorSpec], ipc: str, tiny: bool) -> list[Record]:
    """Stage over tcp and ipc, each round next to a copy of the same bytes."""
    names = ("stage_zmq_tcp", "stage_zmq_ipc")
    source = [torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs]
    target = [torch.ones(spec.shape, dtype=spec.dtype) for spec in specs]
    time_copy(source, target)
    times_s: dict[str, list[float]] = {name: [] for name in (*names, "memcpy", "pack", "publish")}
    num_bytes = sum(spec.num_bytes for spec in specs)
    with running_publisher(["tcp://127.0.0.1:0", ipc], tiny) as publisher:
        subscribers = [WeightSubscriber(address, expect=specs) for address in publisher.addresses]
        for number in range(rounds + 1):
            for index, name in enumerate(names):
                copy_s = time_copy(source, target)
                publisher.send("publish", index, number * len(names) + index + 1)
                update = subscribers[index].wait(TIMEOUT_S)
                stage_s, staged_bits = update.stats.stage_s, sum_bits(update)
                update.commit()
                answer = publisher.read()
                if answer["bits"] != staged_bits or answer["num_bytes"] != num_bytes:
                    raise SystemExit(f"{name}: what was staged is not what was published")
                if number:  # the first round faults memory in on both sides
                    times_s["memcpy"].append(copy_s)
                    times_s["pack"].append(answer["phases_s"]["pack"])
                    times_s[name].append(stage_s)
        for subscriber in subscribers:
            subscriber.close()
    copy_s = statistics.median(times_s["memcpy"])
    records = []
    for name in (*names, "pack"):
        value = statistics.median(times_s[name])
        note = f"{num_bytes / value / 1e9:.2f} GB/s, the copy {num_bytes / copy_s / 1e9:.2f} GB/s"
        records.append(Record(name, value, "s", "memcpy", copy_s, value / copy_s, rounds, note))
    return records


def describe_machine() -> dict[str, str | int]:
    """What the figures were taken on."""
    cpu = next((row.split(":")[1].strip() for row in _read_lines("/proc/cpuinfo") if row.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zmq": zmq.zmq_version(),
        "weightcast": weightcast.__version__,
    }


def _read_lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def show(records: list[Record]) -> None:
    """The records as a table on the terminal."""
    table = Table("case", "value", "unit", "baseline", "baseline value", "ratio", "note")
    for record in records:
        cells = (f"{record.value:.3f}", record.unit, record.baseline, f"{record.baseline_value:.3f}")
        table.add_row(record.case, *cells, f"{record.ratio:.2f}", record.note)
    Console(width=140).print(table)


def main() -> None:
    """Run all cases, show them, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--tiny", action="store_true", help="a model of 40 MB: to try the program, not for figures")
    parser.add_argument("--skip-engine", action="store_true", help="measure staging only, without starting an engine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    specs = qwen3_specs(**TINY) if options.tiny else qwen3_specs()
    with tempfile.TemporaryDirectory() as folder:
        records = run_staging(options.rounds, specs, f"ipc://{folder}/bench", options.tiny)
        records += run_codec(options.rounds, options.tiny)
        records += run_digest(options.rounds, options.tiny)
        records += run_shared_memory(options.rounds, options.tiny)
        if not (options.skip_engine or options.tiny):
            records.append(run_pause(options.rounds, specs, Path(folder)))
    results = {"machine": describe_machine(), "records": [asdict(record) for record in records]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    show(records)


if __name__ == "__main__":
    main()
