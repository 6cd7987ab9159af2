"""Engines that read a trainer's parameters where they lie, version by version.

The GPU is a stand-in whose device is host memory (`host_driver`): all but the driver's own calls runs.
"""

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.sync.host_driver import HostDriver
from tests.sync.parts import (
    PATIENT,
    WAIT_S,
    Engine,
    assert_same_bits,
    bits,
    make_model,
    make_specs,
    publishers,
    running,
    wait_until,
)

from weightcast.sync import FleetPolicy, HeldRegion, TensorSpec, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError
from weightcast.sync.in_place import Held
from weightcast.sync.transports import cuda_driver, cuda_ipc

IN_PLACE = {"expose": ("cuda_ipc",), "delta": "off", "in_place": True, "timeout_s": WAIT_S}


class LiveSource:
    """Parameters in a driver's memory, and of every kind that must be packed: elsewhere, cast, made, without rows."""

    rank, world_size = 0, 1

    def __init__(self, driver: HostDriver, seed: int = 0) -> None:
        model = make_model(seed, rows=300)
        outside = {"outside": make_model(seed + 50)["embed.weight"]}
        odd = {
            "wide": torch.randn(40, 96).to(torch.bfloat16),
            "cast": torch.randn(30, 16),
            "turned": torch.randn(16, 24),
        }
        self.params = driver.move_in(model | odd) | outside

    def tensors(self) -> dict[str, torch.Tensor]:
        """As engines are to have them."""
        views = {name: self._live(name) for name in self.params}
        return {name: view.to(torch.bfloat16) if name == "cast" else view for name, view in views.items()}

    def _live(self, name: str) -> torch.Tensor:
        param = self.params[name]
        match name:
            case "wide":
                return param[:, 16:80]
            case "turned":
                return param.t()
            case "norm.weight":
                return param + 1
            case "layer.0.scale":
                return param.clone()
        return param

    def specs(self) -> list[TensorSpec]:
        return make_specs(self.tensors())

    def held(self) -> list[HeldRegion]:
        made = "norm.weight"
        return [HeldRegion(s.whole(), partial(self._live, s.name), is_made=s.name == made) for s in self.specs()]

    def step(self, seed: int) -> None:
        """Change every parameter where it lies."""
        for number, param in enumerate(self.params.values()):
            flat = param.view(-1).view(torch.uint8)
            limit = 2 if param.dtype is torch.bool else 256
            flat.copy_(torch.randint(0, limit, flat.shape, dtype=torch.uint8, generator=_generator(seed + number)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_engine(name: str, address: str, **kwargs: object) -> Engine:
    return Engine(name, address, kwargs=kwargs, limits=PATIENT)


def test_versions_reach_engines_on_the_device_on_the_host_and_by_wire(
    as_gpu: HostDriver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    address, source = f"ipc://{tmp_path}/p", LiveSource(as_gpu)
    engines = [
        make_engine("on-device", address, device="cpu", transport="cuda_ipc"),
        make_engine("auto", address, device="cpu"),
        make_engine("on-host", address, transport="cuda_ipc"),
        make_engine("wire", address, transport="zmq"),
        make_engine("wire-to-device", address, transport="zmq", device="cpu"),
    ]
    with WeightPublisher(source, address, chunk_bytes=8192, **IN_PLACE) as publisher, running(*engines):  # type: ignore[arg-type]
        publisher.wait_for_subscribers(len(engines))
        for number in range(1, 6):
            source.step(1000 * number)
            if number == 4:  # as distributed optimizers do
                source.params["embed.weight"] = as_gpu.move_in({"": source.params["embed.weight"]})[""]
            report = publisher.publish(number)
            for engine in engines:
                assert_same_bits(engine.tensors, source.tensors())
            carried = {engine.engine: engine.transport for engine in report.engines}
            wanted = {"on-device": "cuda_ipc", "auto": "cuda_ipc", "on-host": "cuda_ipc"}
            assert carried == wanted | {"wire": "zmq", "wire-to-device": "zmq"}
            assert not any(engine.num_repeats for engine in report.engines)
    assert not any(engine.errors for engine in engines)
    # What was packed is given back, twice: once when a parameter had moved.
    wait_until(lambda: as_gpu.freed == 2)
    said = [record.message for record in caplog.records if "which are packed" in record.message]
    assert len(said) == 2 and "cannot be shared" in said[0]
    packed = [name for name in source.params if name in ("outside", "cast", "turned", "norm.weight", "layer.0.scale")]
    num_packed = sum(source.tensors()[name].nbytes for name in packed)
    assert f"but for {num_packed} of " in said[0]


def test_ranks_give_their_own_parts(as_gpu: HostDriver, tmp_path: Path) -> None:
    tensors = as_gpu.move_in(make_model(3, rows=300))
    engine = make_engine("engine", f"ipc://{tmp_path}/p", device="cpu", transport="cuda_ipc")
    with publishers(tensors, 2, engine.address, chunk_bytes=8192, **IN_PLACE) as made, running(engine):
        made[0].wait_for_subscribers(1)
        for number in (1, 2):
            for tensor in tensors.values():
                tensor.view(-1).view(torch.uint8).bitwise_xor_(1)
            begun = [publisher.begin(number, hold=True) for publisher in made]
            assert {publication.wait().engines[0].transport for publication in begun} == {"cuda_ipc"}
            assert_same_bits(engine.tensors, tensors)


def test_what_was_read_wrongly_is_fetched_over_the_wire(as_gpu: HostDriver, tmp_path: Path) -> None:
    as_gpu.torn = True
    tensors = as_gpu.move_in(make_model(1, rows=300))
    engine = make_engine("engine", f"ipc://{tmp_path}/p", device="cpu", transport="cuda_ipc")
    with publishers(tensors, 1, engine.address, **IN_PLACE) as (publisher,), running(engine):
        publisher.wait_for_subscribers(1)
        report = publisher.publish(1)
    assert_same_bits(engine.tensors, tensors)
    assert report.engines[0].num_repeats == 1


def test_weights_that_change_while_they_are_read_are_never_served(as_gpu: HostDriver, tmp_path: Path) -> None:
    tensors, address = as_gpu.move_in(make_model(1, rows=300)), f"ipc://{tmp_path}/p"
    engines = [make_engine("near", address, device="cpu"), make_engine("wire", address, transport="zmq")]
    policy = FleetPolicy.all(minimum=len(engines))
    with publishers(tensors, 1, address, policy=policy, **IN_PLACE) as (publisher,):
        publication = publisher.begin(1, hold=True)
        publication.copied()
        tensors["embed.weight"].view(torch.int16)[7, 7] += 1  # too early: nobody has read it yet
        with running(*engines):
            with pytest.raises(EngineError, match=r"embed\.weight"):
                publication.wait()
            publication.packed()
            assert not any(engine.tensors for engine in engines)
            publisher.publish(2)
            for engine in engines:
                assert_same_bits(engine.tensors, tensors)
                assert engine.numbers == [2]


def test_weights_may_be_changed_when_begin_returns_and_who_joins_later_gets_the_next_version(
    as_gpu: HostDriver, tmp_path: Path
) -> None:
    tensors, address = as_gpu.move_in(make_model(1, rows=300)), f"ipc://{tmp_path}/p"
    first, late = (make_engine(name, address, device="cpu") for name in ("first", "late"))
    with publishers(tensors, 1, address, **IN_PLACE) as (publisher,), running(first):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        assert first.numbers == [1]
        wanted = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.zero_()
        assert publication.wait().engines[0].transport == "cuda_ipc"
        assert_same_bits(first.tensors, wanted)
        assert publication.wait().stall_s > publication.wait().phases_s["pack"]
        with running(late):
            publisher.wait_for_subscribers(2)
            time.sleep(0.3)
            assert late.numbers == [] and not late.errors
            publisher.publish(2)
            assert late.numbers == [2]
            assert_same_bits(late.tensors, tensors)


def test_an_engine_that_waits_too_late_reads_nothing_that_may_have_changed(as_gpu: HostDriver, tmp_path: Path) -> None:
    tensors, address = as_gpu.move_in(make_model(1, rows=300)), f"ipc://{tmp_path}/p"
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with (
        publishers(tensors, 1, address, policy=FleetPolicy.all(minimum=1), **IN_PLACE) as (publisher,),
        WeightSubscriber(address, engine="e", into=into, device="cpu", limits=PATIENT) as engine,
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(DeadlineExceeded):
            publisher.publish(1, timeout_s=0.5)
        for tensor in tensors.values():
            tensor.view(-1).view(torch.uint8).fill_(1)
        with pytest.raises(DeadlineExceeded):
            engine.wait(0.5)
        assert engine.held == Held() and not any(bits(tensor).any() for tensor in into.values())
        publication = publisher.begin(2, hold=True)
        update = engine.wait(WAIT_S)
        update.commit()
        assert publication.wait().engines[0].transport == "cuda_ipc"
        assert_same_bits(into, tensors)


@pytest.mark.parametrize("delta", ["auto", "on", "zstd"])
def test_deltas_do_not_go_with_it(tmp_path: Path, delta: str) -> None:
    with pytest.raises(ConfigError, match='use delta="off", or leave out in_place'), publishers(
        make_model(1), 1, f"ipc://{tmp_path}/p", **(IN_PLACE | {"delta": delta})
    ):  # fmt: skip
        pass


@pytest.fixture(params=["no GPU", "weights elsewhere"])
def nothing_in_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the warning says where no weights can be read in place."""
    if request.param == "no GPU":
        if torch.cuda.is_available():
            pytest.skip("needs a machine without a GPU")
        cuda_driver.find_driver.cache_clear()
        yield "needs a GPU"
    else:
        driver = HostDriver()
        monkeypatch.setattr(cuda_ipc, "find_driver", lambda: driver)
        yield "memory that torch's allocator took on cpu cannot be shared"


def test_where_none_can_be_read_all_are_packed_as_usual(
    nothing_in_place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, engine = make_model(1), make_engine("engine", f"ipc://{tmp_path}/p")
    with publishers(tensors, 1, engine.address, **IN_PLACE) as (publisher,), running(engine):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            tensors["embed.weight"].zero_()
            publisher.publish(number)
            assert_same_bits(engine.tensors, tensors)
    said = [record.message for record in caplog.records if "packed as usual" in record.message]
    assert len(said) == 1 and nothing_in_place in said[0]


def test_once_they_lie_where_none_can_be_read_versions_go_on_packed(
    as_gpu: HostDriver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, address = LiveSource(as_gpu), f"ipc://{tmp_path}/p"
    engines = [make_engine("engine", address, device="cpu"), make_engine("wire", address, transport="zmq")]
    with WeightPublisher(source, address, chunk_bytes=8192, **IN_PLACE) as publisher, running(*engines):  # type: ignore[arg-type]
        publisher.wait_for_subscribers(len(engines))
        for number in (1, 2, 3):
            if number == 2:  # as a trainer does that offloads its weights
                source.params = {name: param.clone() for name, param in source.params.items()}
            source.step(number)
            report = publisher.publish(number)
            assert ("hold" in report.phases_s) == (number == 1)
            for engine in engines:
                assert_same_bits(engine.tensors, source.tensors())
            assert {engine.transport for engine in report.engines} == {"cuda_ipc", "zmq"}
    assert sum("packed as usual" in record.message for record in caplog.records) == 1
