"""Cases that move a whole model from one process into another: weightcast's transports against each baseline.

"For the place": on one host weightcast has shared memory; between hosts (here the loopback) it has TCP links and
ZeroMQ. A baseline is met by the best of what there is for its place.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

from measure import take_turns
from peers import Link
from records import Reading, Settings
from shapes import MODELS

OURS = "weightcast_mover"
TCP = "tcp://127.0.0.1:0"
# The ways for each place, as options of both ends. `direct`: the weights are read or sent where they lie.
PLACES: dict[str, dict[str, dict[str, Any]]] = {
    "host": {
        "shared_memory": {"transport": "shared_memory"},
        "shared_memory, in place": {"transport": "shared_memory", "direct": True},
    },
    "network": {
        "tcp": {"transport": "tcp", "address": TCP},
        "tcp, in place": {"transport": "tcp", "address": TCP, "direct": True},
        "zmq": {"transport": "zmq", "address": TCP},
    },
    "zmq": {"zmq": {"transport": "zmq", "address": TCP}},
}


def model_for(settings: Settings) -> str:
    """1.19 GB, or a small one to try the program."""
    return "tiny" if settings.quick else "qwen3-0.6b"


def num_bytes(model: str) -> int:
    """Of a whole model."""
    return sum(spec.num_bytes for spec in MODELS[model]())


def race(
    settings: Settings, *, place: str, baseline: str | None, options: Mapping[str, Any] | None = None, note: str = ""
) -> Reading:
    """The best of our transports for `place` against a baseline's module, in GB/s; None is a copy in the sender."""
    model = model_for(settings)
    with ExitStack() as stack:
        ways = PLACES[place].items()
        ours = {name: stack.enter_context(Link(OURS, model, options=way)) for name, way in ways}
        contestants: dict[str, Callable[[], float]] = {name: _seconds(link) for name, link in ours.items()}
        if baseline is None:
            contestants["baseline"] = next(iter(ours.values())).copy
        else:
            contestants["baseline"] = _seconds(stack.enter_context(Link(baseline, model, options=options or {})))
        times_s = take_turns(contestants, settings.rounds)
        carried = {name: name.replace(name.split(",")[0], ", ".join(link.transports())) for name, link in ours.items()}
    theirs_s = times_s.pop("baseline")
    best = min(times_s, key=lambda name: median(times_s[name]))
    size_gb = num_bytes(model) / 1e9
    return Reading(
        [size_gb / s for s in times_s[best]],
        [size_gb / s for s in theirs_s],
        "GB/s",
        f"carried by {carried[best]}; {note}".rstrip("; "),
        {f"{name}_s": median(values) for name, values in times_s.items()} | {"baseline_s": median(theirs_s)},
    )


def race_workers(settings: Settings, *, workers: int, slices: bool = False) -> Reading:
    """Seconds until the last of several engine workers of a host, which share a copy, has it, against one alone.

    With `slices` each wants its own part of the model, together all of it, and bits are those of all that was received.
    """
    model = model_for(settings)
    options = PLACES["host"]["shared_memory"]
    receivers = _named(workers)
    if slices:
        receivers = [named | {"slices": (rank, workers)} for rank, named in enumerate(receivers)]
    with (
        Link(OURS, model, options=options, receiver_options=receivers, receiver_namespaces=[None] * workers) as many,
        Link(OURS, model, options=options) as one,
    ):
        times_s = take_turns({"many": _seconds(many), "one": _seconds(one)}, settings.rounds)
        note = f"carried by {', '.join(many.transports())}"
    return Reading(times_s["many"], times_s["one"], "s", note)


def _named(count: int) -> list[dict[str, Any]]:
    return [{"engine": f"worker-{number}", "share": "workers"} for number in range(count)]


def _seconds(link: Link) -> Callable[[], float]:
    return lambda: link.move().seconds


def measure_checking(settings: Settings) -> Reading:
    """Seconds of checking what came, against the seconds of its publish, over the loopback.

    The engine's span `check` has the passes that do nothing else. What lands in a pass that copies and digests is
    copied once more after each version, with digests and without; the difference, if digests cost any, is added.
    """
    checks_s: list[float] = []
    publishes_s: list[float] = []
    passes_s: list[float] = []
    with Link(OURS, model_for(settings), options=PLACES["zmq"]["zmq"]) as link:
        for number in range(settings.rounds + 1):
            move = link.move()
            (engine,) = move.senders[0]["engines"].values()
            extra_s = link.receivers[0].ask("check")["check_s"]
            if number:
                passes_s.append(engine["spans_s"]["check"])
                checks_s.append(passes_s[-1] + extra_s)
                publishes_s.append(move.senders[0]["end_s"] - move.senders[0]["start_s"])
    note = f"{median(passes_s) * 1000:.0f} ms in passes of their own, the rest within the copies"
    return Reading(checks_s, publishes_s, "s", note)


def measure_memory(settings: Settings, *, side: str, in_place: bool = False, way: str = "zmq") -> Reading:
    """The peak of a process's memory beyond what it had before it met the other end, against the model.

    Versions differ in 0.8 % of the elements. Of the receiver all counts, for it holds no model but what it stages; of
    one whose versions land in place the model that it has is not counted. `way` is one of those of `PLACES`.
    """
    model = model_for(settings)
    extra_bytes: list[float] = []
    own_bytes = num_bytes(model) if in_place else 0
    receiver = {"into": in_place}
    state = {"step": "sparse", "density": 0.008}
    options = (PLACES["host"] | PLACES["zmq"])[way]
    with Link(OURS, model, state, options, receiver_options=[receiver]) as link:
        for number in range(settings.rounds + 1):
            move = link.move()
            if number:
                answers = move.senders if side == "source" else move.receivers
                extra_bytes.append((answers[0]["extra_bytes"] - own_bytes) / 1e9)
    return Reading(extra_bytes, [num_bytes(model) / 1e9] * settings.rounds, "GB")
