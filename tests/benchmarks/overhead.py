"""What a version costs besides the device's work: messages, threads, tables and checks, in ms.

Trainer and engine are processes of their own, and a model has the tensors, chunks and pieces of one of 16.4 GB, but
next to no bytes (`host_gpu_mover`).
"""

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median, quantiles
from typing import Any

from measure import take_turns
from moves import num_bytes
from peers import Link
from records import Reading, Settings

from weightcast.sync.chunks import MIN_CHUNK_BYTES

MOVER = "host_gpu_mover"
MODEL, BASELINE = "qwen3-8b-small", "one-tensor"
VERSIONS_A_ROUND = 30
# Chunks of the real model's largest size over its matrices, as of these here.
OPTIONS: dict[str, Any] = {
    "transport": "cuda_ipc",
    "expose": ["cuda_ipc"],
    "chunk_bytes": MIN_CHUNK_BYTES,
    "direct": True,
}


def measure_overhead(settings: Settings, *, into: bool = True) -> Reading:
    """Milliseconds from `publish` to a version in the engine's tensors, of many tensors against one.

    A round's value is the median of its versions. `worst_ms` is what one version in twenty exceeds.
    """
    found: dict[str, list[float]] = {MODEL: [], BASELINE: []}
    works_ms: list[float] = []
    stages_ms: list[float] = []
    with ExitStack() as stack:
        receiver = {"device": "cpu", "into": into}
        links = {
            name: stack.enter_context(Link(MOVER, name, {"device": "cpu"}, OPTIONS, receiver_options=[receiver]))
            for name in found
        }

        def measure(name: str) -> Callable[[], float]:
            def run() -> float:
                values = []
                for _ in range(3 if settings.quick else VERSIONS_A_ROUND):
                    moved = links[name].move()
                    values.append(moved.seconds * 1e3)
                    if name == MODEL:
                        works_ms.append(max(end["work_s"] for end in (*moved.senders, *moved.receivers)) * 1e3)
                        stages_ms.append(moved.receivers[0]["stage_s"] * 1e3)
                found[name] += values
                return median(values)

            return run

        values = take_turns({name: measure(name) for name in found}, settings.rounds)
    details = {
        "work_ms": median(works_ms),
        "stage_ms": median(stages_ms),
        "worst_ms": quantiles(found[MODEL], n=20)[-1],
        "baseline_worst_ms": quantiles(found[BASELINE], n=20)[-1],
    }
    note = (
        f"{num_bytes(MODEL) / 1e6:.1f} MB, medians of {len(found[MODEL])} versions; of it {details['work_ms']:.1f} ms "
        f"the stand-in's copy and digests, one version in 20 takes {details['worst_ms']:.1f} ms"
    )
    return Reading(values[MODEL], values[BASELINE], "ms", note, details)
