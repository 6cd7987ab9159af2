"""What every transport must do between publishers and engines, whatever its chunks lie in or go over.

Several sources and engines, versions in order, slow engines, deadlines, refusals, and engines that come late. A new
transport joins by an entry in `WAYS`. What goes wrong with single chunks is in `test_transport.py` and in the file of
each transport; versions in a folder are in `test_disk_publish.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.sync.host_driver import HostDriver
from tests.sync.parts import WAIT_S, Engine, assert_same_bits, make_model, on_all, publishers, running

from weightcast.sync import FleetPolicy, Limits, PublishReport, WeightPublisher, WeightSubscriber, device_passes
from weightcast.sync.errors import DeadlineExceeded, EngineError
from weightcast.sync.transports import cuda_ipc, mooncake

TCP = "tcp://127.0.0.1:0"
NUM_SOURCES = 2
CHUNK_BYTES = 8192
PATIENT = Limits(chunk_timeout_s=WAIT_S, lost_after_s=WAIT_S)
# What the publisher exposes, and what an engine says besides the transport's name.
WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "zmq": ((), {}),
    "tcp": (("tcp",), {}),
    "shared_memory": (("shared_memory",), {}),
    "cuda_ipc": (("cuda_ipc",), {"device": "cpu"}),
    "collective": (("collective",), {}),
    "mooncake": (("mooncake",), {}),
}


@pytest.fixture(params=sorted(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    """Each transport; a stand-in takes the GPU's part."""
    if request.param == "cuda_ipc":
        request.getfixturevalue("by_torch")
    if request.param == "mooncake" and (reason := mooncake.unavailable_reason()):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def by_torch(driver: HostDriver, monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """As `as_gpu`, which has every test twice."""
    monkeypatch.setattr(device_passes, "find_runner", lambda device: None)
    monkeypatch.setattr(cuda_ipc, "find_driver", lambda: driver)
    return driver


@contextmanager
def publishing(way: str, tensors: dict[str, torch.Tensor], **settings: Any) -> Iterator[list[WeightPublisher]]:
    """Two ranks that publish by one way."""
    settings = {"chunk_bytes": CHUNK_BYTES, "delta": "off", "timeout_s": WAIT_S, "expose": WAYS[way][0]} | settings
    with publishers(tensors, NUM_SOURCES, TCP, **settings) as made:
        yield made


def settings_of(way: str) -> dict[str, Any]:
    """Those of an engine."""
    return {"transport": way} | WAYS[way][1]


def change(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Other weights."""
    for name, tensor in make_model(seed, rows=300).items():
        tensors[name].copy_(tensor)


def publish(made: list[WeightPublisher], number: int) -> PublishReport:
    """A version from every rank; rank 0's report."""
    reports = on_all(made, lambda publisher: publisher.publish(number))
    assert all(isinstance(report, PublishReport) for report in reports), reports
    return reports[0]  # type: ignore[return-value]


def test_versions_come_in_order_and_whole_from_all_sources_to_all_engines(way: str) -> None:
    tensors = make_model(0, rows=300)
    with publishing(way, tensors) as made:
        engines = [Engine(name, made[0].address, kwargs=settings_of(way), limits=PATIENT) for name in "abc"]
        with running(*engines):
            made[0].wait_for_subscribers(len(engines))
            for number in (1, 2, 3):
                change(tensors, number)
                report = publish(made, number)
                for engine in engines:
                    assert_same_bits(engine.tensors, tensors)
            # A broadcast begins at a version's border, with who is willing by then; what it lacks is asked for.
            assert all(way in engine.transport for engine in report.engines)
            assert all(engine.checksums_checked for engine in report.engines)
    assert all(engine.numbers == [1, 2, 3] and not engine.errors for engine in engines)


def test_an_engine_that_is_slow_or_comes_late_has_whole_versions_and_never_an_older_one(way: str) -> None:
    tensors = make_model(0, rows=300)
    with publishing(way, tensors, policy=FleetPolicy.quorum(1)) as made:
        fast = Engine("fast", made[0].address, kwargs=settings_of(way), limits=PATIENT)
        with (
            running(fast),
            WeightSubscriber(made[0].address, engine="slow", limits=PATIENT, **settings_of(way)) as slow,
        ):
            made[0].wait_for_subscribers(2)
            change(tensors, 1)
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            publish(made, 1)
            update = slow.wait(WAIT_S)
            assert update.version.number == 1
            for number in (2, 3):
                change(tensors, number)
                publish(made, number)
            assert_same_bits(dict(update), before)  # it loads one meanwhile
            update.commit()
            with WeightSubscriber(made[0].address, engine="late", limits=PATIENT, **settings_of(way)) as late:
                for subscriber in (slow, late):
                    update = subscriber.wait(WAIT_S)
                    assert update.version.number == 3
                    assert_same_bits(dict(update), tensors)
                    update.commit()


def test_who_does_not_take_a_version_is_a_deadline_and_who_refuses_one_is_named(way: str) -> None:
    tensors = make_model(1, rows=300)
    with (
        publishing(way, tensors, timeout_s=2.0) as made,
        WeightSubscriber(made[0].address, engine="idle", limits=PATIENT, **settings_of(way)) as idle,
    ):
        made[0].wait_for_subscribers(1)
        ended = on_all(made, lambda publisher: publisher.publish(1))
        assert all(isinstance(error, DeadlineExceeded) and "idle" in str(error) for error in ended), ended
        idle.wait(WAIT_S).reject("no room")
        change(tensors, 2)
        publications = [publisher.begin(2, timeout_s=WAIT_S, hold=True) for publisher in made]
        idle.wait(WAIT_S).reject("no room either")
        errors = on_all(made, lambda publisher: publications[made.index(publisher)].wait())
        assert all(isinstance(error, EngineError) and "no room either" in str(error) for error in errors), errors
        change(tensors, 3)
        publications = [publisher.begin(3, timeout_s=WAIT_S, hold=True) for publisher in made]
        update = idle.wait(WAIT_S)
        assert_same_bits(dict(update), tensors)
        update.commit()
        reports = on_all(made, lambda publisher: publications[made.index(publisher)].wait())
        assert all(isinstance(report, PublishReport) for report in reports), reports
