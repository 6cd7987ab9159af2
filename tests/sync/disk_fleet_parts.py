"""What tests of a fleet over a store share: a publisher, a publish beside the test, and what engines have said."""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.sync.parts import WAIT_S, TensorSource

from weightcast.sync import (
    DiskPublisher,
    DiskReport,
    FleetPolicy,
)
from weightcast.sync.disk.fleet_records import Member, member_file
from weightcast.sync.disk.records import Hashing, unseal
from weightcast.sync.errors import WeightcastError

# Quick enough for a test, patient enough for a busy machine.
LOST_AFTER_S = 2.0

Tensors = dict[str, torch.Tensor]


def make_publisher(tensors: Tensors, place: Path, policy: FleetPolicy | None = None, **more: Any) -> DiskPublisher:
    policy = FleetPolicy.all() if policy is None else policy
    options = {"anchor_every": 4, "lost_after_s": LOST_AFTER_S, "timeout_s": WAIT_S} | more
    return DiskPublisher(TensorSource(tensors), place, policy=policy, **options)


class Publishing(threading.Thread):
    """A publish that goes on beside the test; `join` it for its report, or the error that it raised."""

    def __init__(self, publisher: DiskPublisher, number: int, **more: float) -> None:
        super().__init__()
        self._publish = partial(publisher.publish, number, **more)
        self._result: DiskReport | WeightcastError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._publish()
        except WeightcastError as error:
            self._result = error

    def end(self) -> DiskReport:
        """The report; raises what the publish raised."""
        self.join(3 * WAIT_S)
        assert self._result is not None, "the publish still runs"
        if isinstance(self._result, WeightcastError):
            raise self._result
        return self._result


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S} s for {what}"
        time.sleep(0.01)


def read_member(root: Path, engine: str) -> Member:
    return unseal((root / "engines" / member_file(engine)).read_bytes(), Member, Hashing())


def has_staged(root: Path, engine: str, number: int) -> bool:
    file = root / "engines" / member_file(engine)
    staged = read_member(root, engine).staged if file.exists() else None
    return staged is not None and staged.number == number
