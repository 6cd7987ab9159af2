"""CUDA IPC but for the driver's own calls: tickets, who gets in, how long memory stays, and versions over it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.ranks import ROOT
from tests.sync.host_driver import UUID, HostDriver
from tests.sync.parts import PATIENT, WAIT_S, Engine, TensorSource, assert_same_bits, make_model, running, wait_until

from weightcast.sync import DeltaMode, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import ConfigError, EngineError, ReachError, WireError
from weightcast.sync.host import folders
from weightcast.sync.schema import pack
from weightcast.sync.transports import cuda_driver, cuda_ipc
from weightcast.sync.transports.base import Reach
from weightcast.sync.transports.cuda_ipc import ExposedDeviceMemory, ReachedDeviceMemory, expose, reach, read_ticket

NUM_BYTES = 10_000


@pytest.fixture
def exposed(driver: HostDriver, tmp_path: Path) -> Iterator[ExposedDeviceMemory]:
    exposed = expose(NUM_BYTES, driver=driver, base=tmp_path)
    yield exposed
    exposed.close()


@pytest.fixture
def reached(exposed: ExposedDeviceMemory, driver: HostDriver) -> Iterator[ReachedDeviceMemory]:
    reached = reach(exposed.ticket, WAIT_S, driver=driver)
    assert isinstance(reached, ReachedDeviceMemory)
    yield reached
    reached.close()


def test_what_is_packed_on_the_device_is_read_there(exposed: ExposedDeviceMemory, reached: ReachedDeviceMemory) -> None:
    assert len(exposed.memory) == NUM_BYTES == reached.num_bytes and not exposed.device_memory.any()
    exposed.device_memory.copy_(torch.arange(NUM_BYTES) % 251)
    assert torch.equal(reached.device_view(17, 5000), exposed.device_memory[17:5017])
    into = np.zeros(300, np.uint8)
    reached.read(1000, into)
    assert np.array_equal(into, np.arange(1000, 1300) % 251)
    in_host_memory: Reach = reached
    assert in_host_memory.view(0, 10) is None


@pytest.mark.parametrize(("start", "size"), [(-1, 10), (0, NUM_BYTES + 1), (NUM_BYTES, 1), (5, -1)])
def test_nothing_is_read_past_its_ends(reached: ReachedDeviceMemory, start: int, size: int) -> None:
    with pytest.raises(WireError, match=f"outside the source's {NUM_BYTES} bytes"):
        reached.device_view(start, size)


def test_a_ticket_is_small_and_reads_back(exposed: ExposedDeviceMemory) -> None:
    ticket = read_ticket(exposed.ticket)
    assert len(exposed.ticket) <= 1024 and (ticket.num_bytes, ticket.device) == (NUM_BYTES, UUID)


@pytest.mark.parametrize(
    "change",
    [
        {"token": b"short"},
        {"device": UUID + b"x"},
        {"device": b""},
        {"num_bytes": 0},
        {"num_bytes": 1 << 50},
        {"path": "/etc/passwd"},
        {"path": "weightcast-1/socket"},
        {"path": f"/tmp/{folders.PREFIX}x/../socket"},
        {"path": f"/{'long' * 40}/{folders.PREFIX}x/socket"},
    ],
)
def test_a_ticket_that_cannot_be_is_refused(exposed: ExposedDeviceMemory, change: dict[str, object]) -> None:
    ticket = pack(cuda_ipc.KIND, replace(read_ticket(exposed.ticket), **change))  # type: ignore[arg-type]
    with pytest.raises(WireError):
        reach(ticket, WAIT_S, driver=HostDriver())


@pytest.mark.parametrize("raw", [b"", b"noise", b"\x80", bytes(2000)])
def test_noise_is_no_ticket(raw: bytes) -> None:
    with pytest.raises(WireError):
        read_ticket(raw)


def test_another_token_gets_nothing(exposed: ExposedDeviceMemory, driver: HostDriver) -> None:
    ticket = pack(cuda_ipc.KIND, replace(read_ticket(exposed.ticket), token=bytes(32)))
    with pytest.raises(ReachError, match="refused: the ticket is of an earlier life"):
        reach(ticket, WAIT_S, driver=driver)


def test_a_gpu_that_the_engine_does_not_see_is_named(exposed: ExposedDeviceMemory) -> None:
    with pytest.raises(ReachError, match=f"on the GPU {UUID.hex()}, which this process does not see; .*CUDA_VISIBLE"):
        reach(exposed.ticket, WAIT_S, driver=HostDriver(bytes(16)))


def test_a_driver_that_refuses_leaves_nothing_open(exposed: ExposedDeviceMemory, driver: HostDriver) -> None:
    driver.refuses = True
    with pytest.raises(ReachError, match="cannot be opened"):
        reach(exposed.ticket, WAIT_S, driver=driver)
    exposed.close()
    wait_until(lambda: driver.freed == 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(exposed: ExposedDeviceMemory) -> None:
    cuda_driver.find_driver.cache_clear()
    for call in (lambda: expose(NUM_BYTES), lambda: reach(exposed.ticket, WAIT_S)):
        with pytest.raises(ReachError, match="needs a GPU and a torch built for CUDA; use another transport"):
            call()


def test_memory_stays_until_its_last_reader_has_left(exposed: ExposedDeviceMemory, driver: HostDriver) -> None:
    readers = [reach(exposed.ticket, WAIT_S, driver=driver) for _ in range(2)]
    exposed.device_memory.fill_(7)
    exposed.close()
    exposed.close()
    with pytest.raises(ReachError):
        reach(exposed.ticket, WAIT_S, driver=driver)
    readers[0].close()
    readers[0].close()
    time.sleep(0.2)
    assert driver.freed == 0 and bool((readers[1].device_view(0, NUM_BYTES) == 7).all())
    readers[1].close()
    wait_until(lambda: driver.freed == 1)
    assert driver.closed == 2


def test_a_reader_that_is_killed_has_left(exposed: ExposedDeviceMemory, driver: HostDriver) -> None:
    program = (
        "import sys, time; from tests.sync.host_driver import HostDriver;"
        "from weightcast.sync.transports.cuda_ipc import reach;"
        "memory = reach(bytes.fromhex(sys.argv[1]), 10, driver=HostDriver());"
        "print(int(memory.device_view(0, 1)), flush=True); time.sleep(60)"
    )
    exposed.device_memory.fill_(9)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", program, exposed.ticket.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as engine:
        assert engine.stdout is not None and engine.stdout.readline() == "9\n"
        exposed.close()
        time.sleep(0.2)
        assert driver.freed == 0
        engine.kill()
        wait_until(lambda: driver.freed == 1)


# Versions


def make_engine(name: str, address: str, **kwargs: object) -> Engine:
    return Engine(name, address, kwargs=kwargs, limits=PATIENT)


@pytest.mark.parametrize("delta", ["off", "on", "zstd"])
def test_versions_reach_engines_on_the_device_on_the_host_and_by_wire(
    as_gpu: HostDriver, tmp_path: Path, delta: DeltaMode
) -> None:
    address = f"ipc://{tmp_path}/p"
    engines = [
        make_engine("on-device", address, device="cpu", transport="cuda_ipc"),
        make_engine("auto", address, device="cpu"),
        make_engine("on-host", address, transport="cuda_ipc"),
        make_engine("wire", address, transport="zmq"),
        make_engine("wire-to-device", address, transport="zmq", device="cpu"),
    ]
    tensors = make_model(0, rows=300)
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=8192, expose=("cuda_ipc",), delta=delta, timeout_s=WAIT_S
        ) as publisher,
        running(*engines),
    ):
        publisher.wait_for_subscribers(len(engines))
        for number in range(1, 5):
            if number == 3:
                tensors["embed.weight"].view(torch.int16)[5, :3] += 1
            elif number != 4:
                for name, tensor in make_model(number, rows=300).items():
                    tensors[name].copy_(tensor)
            report = publisher.publish(number)
            for engine in engines:
                assert_same_bits(engine.tensors, tensors)
            carried = {engine.engine: engine.transport for engine in report.engines}
            wanted = {"on-device": "cuda_ipc", "auto": "cuda_ipc", "on-host": "cuda_ipc"}
            assert carried == wanted | {"wire": "zmq", "wire-to-device": "zmq"}
            assert not any(engine.num_repeats for engine in report.engines)
    assert not any(engine.errors for engine in engines)
    wait_until(lambda: as_gpu.freed == 1)


def test_what_was_read_wrongly_is_fetched_over_the_wire(as_gpu: HostDriver, tmp_path: Path) -> None:
    as_gpu.torn = True
    tensors = make_model(1, rows=300)
    engine = make_engine("engine", f"ipc://{tmp_path}/p", device="cpu", transport="cuda_ipc")
    with (
        WeightPublisher(TensorSource(tensors), engine.address, expose=("cuda_ipc",), timeout_s=WAIT_S) as publisher,
        running(engine),
    ):
        publisher.wait_for_subscribers(1)
        report = publisher.publish(1)
    assert_same_bits(engine.tensors, tensors)
    assert report.engines[0].num_repeats == 1


def test_where_it_cannot_be_had_auto_takes_the_wire_and_an_order_for_it_is_refused(
    as_gpu: HostDriver, tmp_path: Path
) -> None:
    as_gpu.refuses = True
    tensors, address = make_model(2), f"ipc://{tmp_path}/p"
    with WeightPublisher(TensorSource(tensors), address, expose=("cuda_ipc",), timeout_s=WAIT_S) as publisher:
        auto = make_engine("auto", address, device="cpu")
        with running(auto):
            publisher.wait_for_subscribers(1)
            assert publisher.publish(1).engines[0].transport == "zmq"
        assert_same_bits(auto.tensors, tensors)
    strict = make_engine("strict", address, transport="cuda_ipc")
    with (
        WeightPublisher(TensorSource(tensors), address, expose=("cuda_ipc",), timeout_s=WAIT_S) as publisher,
        running(strict),
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(EngineError, match=r"transport='cuda_ipc' cannot be had: .* cannot be opened"):
            publisher.publish(1)


def test_workers_that_share_host_memory_stage_on_no_device() -> None:
    with pytest.raises(ConfigError, match="what workers share lies in host memory, not on cuda"):
        WeightSubscriber("ipc:///tmp/none", share="workers", device="cuda")
