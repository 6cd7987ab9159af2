"""Weightcast's own two ends, through its public classes and nothing else: `WeightPublisher` and `WeightSubscriber`.

Options of both: `address` to publish on; `transport`, `delta`, `chunk_bytes` as the classes take them; `keys` as
(publisher's public, secret, engine's public, secret). Of the sender: `expose`, as its class takes it; `direct`, whether
engines read its parameters where they lie. Of the receiver: `engine`, its name; `share`, the group of its host's
workers with which it receives once; `slices`, (rank, ranks) of a tensor-parallel engine, of whose tensors it wants its
own; `device`, where it stages every version and loads it into parameters of its own
(otherwise what was staged is what it has, as an engine that iterates over an update gets it). With `points` its
parameters point to what was staged there instead, as those of an engine do that takes pointers; the ones before stay
whole until then. With `into` versions land in its parameters, and nothing is staged.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from model_state import ModelState, allocate
from peer_process import synchronize

from weightcast.sync import (
    CurveKeys,
    FleetPolicy,
    Limits,
    PublishReport,
    Region,
    TensorSpec,
    WeightPublisher,
    WeightSubscriber,
)

# Nobody is lost before this: where other work has the machine, a case is slow and not over.
TIMEOUT_S = 120.0


class PublishingSender:
    """A trainer rank: its `send` is `publish`."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = options.get("address") or f"ipc://{self._folder.name}/bench"
        arguments = {name: options[name] for name in ("delta", "chunk_bytes", "expose") if name in options}
        if options.get("direct"):
            arguments |= {"in_place": True, "delta": "off"}
        policy = FleetPolicy.all(minimum=options["receivers"])
        self.publisher = WeightPublisher(
            state,
            address,
            policy=policy,
            timeout_s=TIMEOUT_S,
            lost_after_s=TIMEOUT_S,
            keys=publisher_keys(options.get("keys")),
            **arguments,
        )
        self.address = self.publisher.address
        self._members = options.get("members", options["receivers"]) if state.rank == 0 else 0

    def connect(self) -> None:
        """Wait for all members of the fleet."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(self.publisher.fleet()) < self._members:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self._members} members were to join, there are {self.publisher.fleet()}")
            time.sleep(0.02)

    def send(self, number: int) -> dict[str, Any]:
        """Publish, and wait until the fleet serves it. Answers the report's figures."""
        return describe_report(self.publisher.publish(number, timeout_s=TIMEOUT_S))

    def close(self) -> None:
        """End."""
        self.publisher.close()
        self._folder.cleanup()


def describe_report(report: PublishReport) -> dict[str, Any]:
    """The figures of a report that cases use."""
    return {
        "phases_s": report.phases_s,
        "num_bytes": report.num_bytes,
        "engines": {
            engine.engine: {
                "pause_s": engine.pause_s,
                "stage_s": engine.stage_s,
                "spans_s": {span.phase: span.end_s - span.start_s for span in engine.spans},
                "transport": engine.transport,
                "num_bytes": engine.num_bytes,
            }
            for engine in report.engines
        },
    }


class SubscribingReceiver:
    """An engine's side: what `wait` returns is staged, complete, verified and released."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        arguments = {name: options[name] for name in ("transport", "share", "device") if name in options}
        is_in_place = bool(options.get("into"))
        self._loads = "device" in options and not options.get("points") and not is_in_place
        self._points = bool(options.get("points"))
        has_own = self._loads or is_in_place
        self.tensors: Mapping[str, torch.Tensor] = allocate(specs, options.get("device", "cpu")) if has_own else {}
        self._own = self.tensors if is_in_place else None
        self._subscriber = WeightSubscriber(
            address,
            engine=options.get("engine", "engine-0"),
            expect=None if is_in_place else specs,
            into=self._own,
            keys=engine_keys(options.get("keys")),
            limits=Limits(lost_after_s=TIMEOUT_S),
            want=None if "slices" not in options else cut_slices(specs, *options["slices"]),
            **arguments,
        )
        self._commit: Callable[[], None] = _nothing

    def receive(self, number: int) -> dict[str, Any]:
        """Wait for the version; load it where there are parameters to load it into."""
        if not self._loads and not self._points and self._own is None:
            self.tensors = {}  # as an engine that has loaded them: memory is reused only when nobody holds it
        update = self._subscriber.wait(TIMEOUT_S)
        if update.version.number != number:
            raise RuntimeError(f"version {number} was to come, {update.version} came")
        start_s = time.monotonic()
        if self._loads:
            for name, tensor in update:
                self.tensors[name].copy_(tensor)
            synchronize()
        elif self._own is None:
            self.tensors = dict(update)
        load_s = time.monotonic() - start_s
        self._commit = update.commit
        stats = update.stats
        return {"stage_s": stats.stage_s, "checksums_checked": stats.checksums_checked, "load_s": load_s}

    def finish(self) -> None:
        """Serve it."""
        self._commit()

    def close(self) -> None:
        """End."""
        self._subscriber.close()


def cut_slices(specs: Sequence[TensorSpec], rank: int, num_ranks: int) -> dict[str, tuple[Region, ...]]:
    """What such a worker keeps: columns of the matrices that are multiplied last, rows of others, vectors whole."""
    wanted: dict[str, tuple[Region, ...]] = {spec.name: (spec.whole(),) for spec in specs}
    for spec in specs:
        if len(spec.shape) == 2:
            dim = 1 if spec.name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            first, end = (spec.shape[dim] * part // num_ranks for part in (rank, rank + 1))
            offset = tuple(first if d == dim else 0 for d in range(2))
            shape = tuple(end - first if d == dim else size for d, size in enumerate(spec.shape))
            wanted[spec.name] = (Region(spec.name, offset, shape),)
    return wanted


def publisher_keys(keys: Sequence[str] | None) -> CurveKeys | None:
    """The publishing side's keys; sources share one pair and hear each other."""
    if keys is None:
        return None
    public, secret, engine, _ = (key.encode() for key in keys)
    return CurveKeys(public, secret, server=public, allowed=(engine, public))


def engine_keys(keys: Sequence[str] | None) -> CurveKeys | None:
    """The engines' keys."""
    if keys is None:
        return None
    server, _, public, secret = (key.encode() for key in keys)
    return CurveKeys(public, secret, server=server)


def _nothing() -> None:
    return None


def open_sender(state: ModelState, options: Mapping[str, Any]) -> PublishingSender:
    """The trainer's side."""
    return PublishingSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> SubscribingReceiver:
    """The engine's side."""
    return SubscribingReceiver(specs, address, options)
