"""Engines of a store that fall silent, die, or read what is damaged: fenced, caught up later, refused by name."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import ROOT
from tests.sync.disk_fleet_parts import (
    LOST_AFTER_S,
    Publishing,
    make_publisher,
    read_member,
    wait_until,
)
from tests.sync.disk_parts import QUICK, folder_of, step, take
from tests.sync.parts import WAIT_S, make_model

from weightcast.sync import (
    DiskSubscriber,
    FleetPolicy,
)
from weightcast.sync.errors import DamagedVersion, DeadlineExceeded


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Callable[[str], "EngineProcess"]]:
    """Starts engines that are processes, and ends them."""
    made: list[EngineProcess] = []

    def start(name: str) -> EngineProcess:
        made.append(EngineProcess(tmp_path / "store", name))
        return made[-1]

    yield start
    for engine in made:
        engine.process.kill()
        engine.process.communicate()


class EngineProcess:
    """`tests/sync/store_engine.py` as a process."""

    def __init__(self, root: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sync.store_engine", str(root), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(word) + "\n")
        self.process.stdin.flush()


@contextmanager
def stopped(engine: EngineProcess) -> Iterator[None]:
    engine.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        engine.process.send_signal(signal.SIGCONT)


def test_a_silent_engine_is_fenced_and_catches_up_and_a_dead_one_holds_nobody_up(
    engines: Callable[[str], EngineProcess], tmp_path: Path
) -> None:
    tensors = make_model(1, 200)
    root = tmp_path / "store"
    with (
        make_publisher(tensors, root) as publisher,
        DiskSubscriber(root, engine="one", limits=QUICK, agree=True) as one,
    ):
        other = engines("other")
        assert other.read() == "ready"
        publisher.wait_for_subscribers(2)
        other.ask("take")
        publishing = Publishing(publisher, 1)
        take(one, tensors, 1)
        assert other.read() == 1
        assert {engine.state for engine in publishing.end().engines} == {"serving"}
        with stopped(other):
            step(tensors, 1)
            publishing = Publishing(publisher, 2)
            take(one, tensors, 2)
            report = publishing.end()
            states = {engine.engine: (engine.state, engine.reason) for engine in report.engines}
            assert states["one"] == ("serving", "") and states["other"] == ("lost", f"silent for {LOST_AFTER_S:g} s")
        other.ask("take")
        assert other.read() == 2  # what the fleet serves, before anything that is not released
        wait_until(lambda: read_member(root, "other").serving == report.version, "the engine to say so")
        os.kill(other.process.pid, signal.SIGKILL)
        step(tensors, 2)
        publishing = Publishing(publisher, 3)
        take(one, tensors, 3)
        assert {engine.engine: engine.state for engine in publishing.end().engines} == {
            "one": "serving",
            "other": "lost",
        }


def test_a_damaged_file_is_a_refusal(tmp_path: Path) -> None:
    tensors = make_model(1, 200)
    with make_publisher(tensors, tmp_path, FleetPolicy.all(minimum=1), anchor_every=1) as publisher:
        with pytest.raises(DeadlineExceeded):
            publisher.publish(1, timeout_s=0.2)
        (data,) = folder_of(tmp_path, 1).glob("model-*.safetensors")
        data.write_bytes(data.read_bytes()[:-1])
        with DiskSubscriber(tmp_path, engine="one", limits=QUICK) as one:
            with pytest.raises(DamagedVersion):
                one.wait(WAIT_S)
            wait_until(lambda: any(engine.refused for engine in publisher.fleet()), "the refusal")
            assert publisher.fleet()[0].reason.startswith(str(tmp_path))
            publishing = Publishing(publisher, 2)
            take(one, tensors, 2)
            assert [engine.state for engine in publishing.end().engines] == ["serving"]
