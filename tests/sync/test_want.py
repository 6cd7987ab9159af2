"""Subscribers that want some boxes of a model, over real sockets and memory: they ask for less, and bits are right."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.sync.host_driver import HostDriver
from tests.sync.parts import (
    LIMITS,
    WAIT_S,
    TensorSource,
    bits,
    make_specs,
    on_all,
    publishers,
    random_bits,
)

from weightcast.sync import (
    PublishReport,
    Region,
    TensorSpec,
    Update,
    WeightPublisher,
    WeightSubscriber,
    shadow,
    wanted_tensors,
)
from weightcast.sync.cut_source import cut_source
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.errors import ConfigError, ModelMismatch
from weightcast.sync.metrics import format_report
from weightcast.sync.transports import cuda_ipc
from weightcast.sync.wanted import Want, WantedRegions, whole

CHUNK_BYTES = 4096
ROWS, COLUMNS, NUM_LAYERS = 64, 96, 3


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no box fills is NaN, so that whoever reads it shows."""

    def make_poisoned(spec: TensorSpec, device: torch.device) -> torch.Tensor:
        return torch.full(spec.shape, float("nan"), dtype=spec.dtype, device=device)

    def allocate_poisoned(num_bytes: int) -> ByteArray:
        return np.full(num_bytes, 0xFF, np.uint8)

    monkeypatch.setattr(wanted_tensors, "make_empty", make_poisoned)
    monkeypatch.setattr(shadow, "_allocate", allocate_poisoned)


def make_layers(seed: int) -> dict[str, torch.Tensor]:
    """A small model as tensor-parallel engines cut it."""
    tensors: dict[str, torch.Tensor] = {"embed": random_bits(torch.bfloat16, (ROWS, COLUMNS), seed)}
    for layer in range(NUM_LAYERS):
        start = 100 * seed + 10 * layer
        tensors[f"{layer}.up"] = random_bits(torch.bfloat16, (2 * ROWS, COLUMNS), start + 1)
        tensors[f"{layer}.down"] = random_bits(torch.bfloat16, (ROWS, 2 * COLUMNS), start + 2)
        tensors[f"{layer}.norm"] = random_bits(torch.float32, (COLUMNS,), start + 3)
    return tensors


def want_of(rank: int) -> Callable[[Sequence[TensorSpec]], WantedRegions]:
    """What rank `rank` of two wants: rows of most, columns of `down`, norms whole."""

    def want(specs: Sequence[TensorSpec]) -> WantedRegions:
        wanted = dict(whole(specs))
        for spec in specs:
            if len(spec.shape) == 2:
                dim = 1 if spec.name.endswith("down") else 0
                shape = [size // 2 if d == dim else size for d, size in enumerate(spec.shape)]
                offset = [rank * (spec.shape[dim] // 2) if d == dim else 0 for d in range(2)]
                wanted[spec.name] = (Region(spec.name, tuple(offset), tuple(shape)),)
        return wanted

    return want


def assert_wanted(update: Update, wanted: WantedRegions, tensors: dict[str, torch.Tensor]) -> None:
    """The wanted boxes have the tensors' bits, and nothing else is there."""
    assert update.wanted is not None and update.wanted.regions == wanted
    assert len(update) == len(tensors)
    seen = []
    for name, tensor in update:
        seen.append(name)
        assert tensor.shape == tensors[name].shape
        left = torch.ones(tensor.shape, dtype=torch.bool)
        for box, part in update.wanted.parts(name):
            left[box.slices] = False
            assert torch.equal(bits(part), bits(tensors[name][box.slices])), name
            assert torch.equal(bits(tensor[box.slices]), bits(tensors[name][box.slices])), name
        assert tensor[left].isnan().all()
    assert seen == list(tensors)


def bump(tensors: dict[str, torch.Tensor]) -> None:
    """Change a few elements of every tensor."""
    for tensor in tensors.values():
        bits(tensor)[::97] += 1


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    yield f"ipc://{tmp_path}/publisher"


@pytest.mark.parametrize(("transport", "num_sources"), [("zmq", 1), ("zmq", 2), ("shared_memory", 2)])
def test_each_engine_asks_for_its_share_alone(address: str, transport: str, num_sources: int) -> None:
    tensors = make_layers(1)
    specs = tuple(make_specs(tensors))
    model_bytes = sum(spec.num_bytes for spec in specs)
    wants = [want_of(0), want_of(1)]
    with publishers(tensors, num_sources, address, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S, delta="on") as made:
        with ExitStack() as stack:
            engines = [
                stack.enter_context(
                    WeightSubscriber(
                        made[0].address, engine=f"engine-{rank}", limits=LIMITS, want=want, transport=transport
                    )
                )
                for rank, want in enumerate(wants)
            ]
            made[0].wait_for_subscribers(2)
            for number in (1, 2, 3):
                pending = [publisher.begin(number) for publisher in made]
                updates = [engine.wait(WAIT_S) for engine in engines]
                for update, want in zip(updates, wants, strict=True):
                    assert_wanted(update, want(specs), tensors)
                    stats = update.stats
                    assert stats.transport == transport
                    assert stats.kept_bytes < 0.52 * stats.model_bytes == 0.52 * model_bytes
                    assert stats.kept_bytes < stats.asked_bytes < 0.9 * model_bytes
                    assert stats.num_bytes <= stats.asked_bytes + CHUNK_BYTES
                    update.commit()
                reports = on_all(pending, methodcaller("wait"))  # type: ignore[arg-type]
                bump(tensors)
        report = reports[0]
    assert isinstance(report, PublishReport), report
    lines = sorted(report.engines, key=lambda line: line.engine)
    assert [line.asked_bytes for line in lines] == [update.stats.asked_bytes for update in updates]
    assert report.asked_share is not None and 0.5 < report.asked_share < 0.9
    # Chunks that a border cuts through come dense, all others as what changed, where they are sent.
    assert report.ratio is not None and report.ratio > (1.2 if transport == "zmq" else 0.99)
    assert f"engines want {report.asked_share * 100:.3g} % of the model" in format_report(report)
    assert not any(line.num_repeats for line in report.engines)


def test_slices_are_read_where_a_trainer_on_a_gpu_has_them(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = HostDriver()
    monkeypatch.setattr(cuda_ipc, "find_driver", lambda: driver)
    tensors = driver.move_in(make_layers(5))
    specs = tuple(make_specs(tensors))
    way = {"expose": ("cuda_ipc",), "delta": "off", "in_place": True, "chunk_bytes": CHUNK_BYTES, "timeout_s": WAIT_S}
    engines = {"here": {"transport": "cuda_ipc"}, "by-wire": {"transport": "zmq"}, "all": {"device": "cpu"}}
    wants = {name: whole if name == "all" else want_of(1) for name in engines}
    with (
        publishers(tensors, 1, address, **way) as (publisher,),
        ExitStack() as stack,
    ):
        opened = {
            name: stack.enter_context(
                WeightSubscriber(address, engine=name, limits=LIMITS, want=wants[name], **setting)  # type: ignore[arg-type]
            )
            for name, setting in engines.items()
        }
        publisher.wait_for_subscribers(len(engines))
        for number in (1, 2):
            pending = publisher.begin(number, hold=True)
            for name, engine in opened.items():
                update = engine.wait(WAIT_S)
                assert_wanted(update, wants[name](specs), tensors)
                update.commit()
            assert not any(line.num_repeats for line in pending.wait().engines)
            bump(tensors)


def test_slices_are_read_where_a_trainer_in_host_memory_has_them(address: str) -> None:
    tensors, want = make_layers(5), want_of(1)
    specs = tuple(make_specs(tensors))
    way = {"expose": ("shared_memory",), "delta": "off", "in_place": True, "timeout_s": WAIT_S}
    with (
        publishers(tensors, 1, address, chunk_bytes=CHUNK_BYTES, **way) as (publisher,),
        WeightSubscriber(address, limits=LIMITS, want=want, transport="shared_memory") as engine,
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            pending = publisher.begin(number, hold=True)
            update = engine.wait(WAIT_S)
            assert_wanted(update, want(specs), tensors)
            update.commit()
            (line,) = pending.wait().engines
            assert line.transport.startswith("shared_memory") and not line.num_repeats
            bump(tensors)


def test_a_publisher_that_is_told_the_borders_sends_each_half_once(address: str) -> None:
    tensors = make_layers(2)
    specs = tuple(make_specs(tensors))
    wants = [want_of(0)(specs), want_of(1)(specs)]
    source = cut_source(TensorSource(tensors), wants)
    with (
        WeightPublisher(source, address, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S, delta="on") as publisher,
        WeightSubscriber(publisher.address, limits=LIMITS, want=wants[1], transport="zmq") as engine,
    ):
        publisher.wait_for_subscribers(1)
        received = []
        for number in (1, 2):
            pending = publisher.begin(number)
            update = engine.wait(WAIT_S)
            assert_wanted(update, wants[1], tensors)
            received.append(update.stats.num_bytes)
            assert update.stats.asked_bytes < 1.3 * update.stats.kept_bytes
            update.commit()
            pending.wait()
            bump(tensors)
    assert received[1] < 0.2 * received[0]


def test_a_late_engine_and_one_that_wants_all_go_along(address: str) -> None:
    tensors = make_layers(3)
    specs = tuple(make_specs(tensors))
    with WeightPublisher(TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as publisher:
        publisher.publish(1)
        with (
            WeightSubscriber(publisher.address, engine="some", limits=LIMITS, want=want_of(0)) as some,
            WeightSubscriber(publisher.address, engine="all", limits=LIMITS, want=whole) as everything,
            WeightSubscriber(
                publisher.address, engine="none", limits=LIMITS, want=lambda specs: {spec.name: () for spec in specs}
            ) as nothing,
        ):
            assert_wanted(some.wait(WAIT_S), want_of(0)(specs), tensors)
            update = everything.wait(WAIT_S)
            assert_wanted(update, whole(specs), tensors)
            assert update.stats.asked_bytes == publisher.num_bytes
            empty = nothing.wait(WAIT_S)
            assert_wanted(empty, {name: () for name in tensors}, tensors)
            assert (empty.stats.asked_bytes, empty.stats.num_bytes, empty.stats.kept_bytes) == (0, 0, 0)


def fail(specs: Sequence[TensorSpec]) -> WantedRegions:
    """A function that cannot say."""
    raise RuntimeError("no loader")


@pytest.mark.parametrize(
    ("want", "message"),
    [
        ({"embed": ()}, "nothing says which boxes of 0.down, .* are wanted; name them"),
        (
            lambda specs: {**whole(specs), "head": ()},
            "boxes of head are wanted, .* want boxes of the tensors that it",
        ),
        (
            lambda specs: {**whole(specs), "embed": (Region("embed", (60, 0), (5, 96)),)},
            r"wanted box embed\[60:65, 0:96\] lies outside embed of shape \(64, 96\)",
        ),
        (
            lambda specs: {
                **whole(specs),
                "embed": tuple(Region("embed", (row, 0), (5, 96)) for row in (0, 4)),
            },
            "wanted boxes of embed overlap",
        ),
        (fail, "nobody can say which boxes are wanted: RuntimeError: no loader"),
    ],
)
def test_boxes_that_cannot_be_are_refused_by_name(address: str, want: Want, message: str) -> None:
    with (
        WeightPublisher(TensorSource(make_layers(4)), address, timeout_s=WAIT_S) as publisher,
        WeightSubscriber(publisher.address, engine="tp-1", limits=LIMITS, want=want) as engine,
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(ModelMismatch, match=f"engine 'tp-1': {message}"):
            engine.wait(WAIT_S)
        deadline_s = time.monotonic() + WAIT_S
        pending = publisher.begin(1)
        while not (reasons := [status.reason for status in publisher.fleet() if status.reason]):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert reasons[0].startswith("engine 'tp-1': ")
        with pytest.raises(Exception, match="did not reach the fleet"):
            pending.wait()


def test_an_observer_wants_nothing() -> None:
    with pytest.raises(ConfigError, match="leave out role or want"):
        WeightSubscriber("tcp://127.0.0.1:1", role="observer", want=whole)
