"""A publisher that broadcasts, its engines, and a model large enough for it."""

from typing import Any

import torch
from tests.sync.parts import (
    WAIT_S,
    Engine,
    make_model,
    on_all,
    random_bits,
    wait_until,
)

from weightcast.sync import Limits, PublishReport, WeightPublisher

TCP = "tcp://127.0.0.1:0"
# Patient: on a busy machine a broadcast that is waited for too short comes over ZeroMQ, which is no fault of it.
PATIENT = Limits(chunk_timeout_s=WAIT_S, lost_after_s=8.0)
BY_BROADCAST: dict[str, Any] = {"chunk_bytes": 1 << 20, "timeout_s": WAIT_S, "expose": ("collective",), "delta": "off"}


def make_large(seed: int) -> dict[str, torch.Tensor]:
    """Some chunks of 1 MiB for each of two sources."""
    return make_model(seed) | {"large": random_bits(torch.bfloat16, (3000, 1200), seed)}


def make_engine(name: str, publisher: WeightPublisher, **kwargs: Any) -> Engine:
    """An engine that wants broadcasts and nothing else, unless told otherwise."""
    return Engine(name, publisher.address, kwargs={"transport": "collective"} | kwargs, limits=PATIENT)


def wait_for_engines(made: list[WeightPublisher], count: int) -> None:
    """Until so many want the next version by broadcast, of every source."""
    made[0].wait_for_subscribers(count)

    def are_there() -> bool:
        servers = [publisher._loop.server.broadcasts for publisher in made]
        return all(server is not None and sum(e.willing for e in server.engines) == count for server in servers)

    wait_until(are_there)


def publish_all(made: list[WeightPublisher], number: int) -> PublishReport:
    """A version from every rank; rank 0's report."""
    reports = on_all(made, lambda publisher: publisher.publish(number))
    assert all(isinstance(report, PublishReport) for report in reports), reports
    report = reports[0]
    assert isinstance(report, PublishReport)
    return report


def change(tensors: dict[str, torch.Tensor], number: int) -> None:
    """As a step of training does."""
    tensors["large"].view(torch.int16)[:, number] += 1


def generation_of(publisher: WeightPublisher) -> int:
    """Of the source's group."""
    server = publisher._loop.server.broadcasts
    assert server is not None
    return server._standing.generation
