"""Deltas and pipelines over real sockets: engines that follow, miss versions, come late and come back have the bits."""

import threading
import time
from operator import methodcaller

import pytest
import torch
from tests.sync.middle import Middle
from tests.sync.parts import (
    LIMITS,
    WAIT_S,
    Engine,
    TensorSource,
    assert_same_bits,
    on_all,
    publishers,
    random_bits,
    running,
)
from tests.sync.simulation import World

from weightcast.sync import FleetPolicy, Limits, PublishReport, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import ConfigError, DeadlineExceeded, VersionError

CHUNK_BYTES = 65536
TCP = "tcp://127.0.0.1:0"


def make_weights() -> dict[str, torch.Tensor]:
    return {
        "wide": random_bits(torch.bfloat16, (300, 400), 1),
        "norm": random_bits(torch.bfloat16, (400,), 2),
        "fp32": random_bits(torch.float32, (100, 50), 3),
    }


def step(tensors: dict[str, torch.Tensor], number: int) -> int:
    """Change one element in a hundred of the wide tensor; how many."""
    changed = tensors["wide"].view(torch.int16).view(-1)[number::100]
    changed += 1
    return changed.numel()


@pytest.mark.parametrize("delta", ["on", "zstd"])
@pytest.mark.parametrize(("num_sources", "links"), [(1, 1), (2, 3)])
def test_engines_follow_by_deltas(delta: str, num_sources: int, links: int) -> None:
    tensors = make_weights()
    limits = Limits(chunk_timeout_s=2.0, lost_after_s=LIMITS.lost_after_s, links=links)
    kwargs = {"chunk_bytes": CHUNK_BYTES, "timeout_s": WAIT_S, "delta": delta}
    with publishers(tensors, num_sources, TCP, **kwargs) as made:
        engine = Engine("e", made[0].address, kwargs={"transport": "zmq"}, limits=limits)
        with running(engine):
            made[0].wait_for_subscribers(1)
            for number in range(4):
                changed = step(tensors, number) if number else 0
                reports = on_all(made, methodcaller("publish", number))
                assert_same_bits(engine.tensors, tensors)
                report = reports[0]
                assert isinstance(report, PublishReport), report
                if number == 0:
                    assert report.density is None and report.ratio == pytest.approx(1.0, abs=0.01)
                else:
                    assert report.density == changed / sum(tensor.numel() for tensor in tensors.values())
                    assert report.ratio is not None and report.ratio > 40
    assert engine.numbers == [0, 1, 2, 3] and engine.errors == []


def test_one_that_missed_versions_gets_one_delta_and_a_newcomer_everything() -> None:
    tensors = make_weights()
    policy = FleetPolicy.quorum(1)
    with WeightPublisher(
        TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S, delta="on", policy=policy
    ) as publisher:
        quick = Engine("quick", publisher.address)
        with running(quick), WeightSubscriber(publisher.address, engine="slow", limits=LIMITS, transport="zmq") as slow:
            publisher.wait_for_subscribers(2)
            publisher.publish(0)
            loading = slow.wait(WAIT_S)
            for number in (1, 2, 3):
                step(tensors, number)
                publisher.publish(number, timeout_s=1.0)
            loading.commit()
            update = slow.wait(WAIT_S)
            assert update.version.number == 3 and update.stats.num_bytes < 40_000
            assert_same_bits(dict(update), tensors)
            update.commit()
            with WeightSubscriber(publisher.address, engine="new", limits=LIMITS, transport="zmq") as new:
                update = new.wait(WAIT_S)
                assert update.stats.num_bytes >= publisher.num_bytes
                assert_same_bits(dict(update), tensors)
    assert_same_bits(quick.tensors, tensors)


def test_an_engine_that_keeps_its_tensors_keeps_them_as_they_are() -> None:
    tensors = make_weights()
    with (
        WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S, delta="on") as publisher,
        WeightSubscriber(publisher.address, engine="e", limits=LIMITS, transport="zmq") as subscriber,
    ):
        kept, copies = [], []
        for number in (0, 1, 2):
            step(tensors, number)
            publication = publisher.begin(number)
            update = subscriber.wait(WAIT_S)
            assert number == 0 or update.stats.num_bytes < 20_000
            kept.append(dict(update))
            copies.append({name: tensor.clone() for name, tensor in tensors.items()})
            update.commit()
            assert publication.wait().serving == ("e",)
        for got, wanted in zip(kept, copies, strict=True):
            assert_same_bits(got, wanted)


def test_an_engine_that_writes_into_its_tensors_is_sent_them_whole() -> None:
    tensors = make_weights()
    with (
        WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S, delta="on") as publisher,
        WeightSubscriber(publisher.address, engine="e", limits=LIMITS, transport="zmq") as subscriber,
    ):
        publication = publisher.begin(0)
        update = subscriber.wait(WAIT_S)
        dict(update)["norm"].zero_()
        update.commit()
        publication.wait()
        step(tensors, 1)
        publication = publisher.begin(1)
        update = subscriber.wait(WAIT_S)
        assert_same_bits(dict(update), tensors)
        assert update.stats.num_repeats > 0
        update.commit()
        assert publication.wait().engines[0].num_repeats > 0


def test_the_trainer_goes_on_while_engines_fetch() -> None:
    tensors = make_weights()
    held = threading.Event()

    def hold(index: int, header: bytes, body: bytes) -> list[list[bytes]]:
        held.wait(WAIT_S)
        return [[header, body]]

    with (
        WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as publisher,
        Middle(publisher.address, hold) as middle,
    ):
        engine = Engine("e", middle.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            wanted = {name: tensor.clone() for name, tensor in tensors.items()}
            publication = publisher.begin(1)
            for tensor in tensors.values():
                tensor.zero_()
            assert engine.numbers == []
            held.set()
            report = publication.wait()
            assert report.serving == ("e",) and publication.wait() is report
            assert_same_bits(engine.tensors, wanted)


def test_the_next_begin_waits_for_the_one_before_and_forgets_its_failure() -> None:
    tensors = make_weights()
    with (
        WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S) as publisher,
        WeightSubscriber(publisher.address, engine="e", limits=LIMITS) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        first = publisher.begin(1, timeout_s=0.5)
        started_s = time.monotonic()
        second = publisher.begin(2)
        assert time.monotonic() - started_s > 0.3
        for _ in range(2):
            with pytest.raises(DeadlineExceeded, match="version 1"):
                first.wait()
        with pytest.raises(VersionError):
            publisher.begin(2)
        update = subscriber.wait(WAIT_S)
        while update.version.number != 2:
            update.reject("too old")
            update = subscriber.wait(WAIT_S)
        update.commit()
        assert second.wait().version.number == 2


def test_auto_compares_when_links_prove_slow_and_says_why() -> None:
    tensors = {"w": random_bits(torch.bfloat16, (2000, 1000), 4)}
    with (
        WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S, chunk_bytes=CHUNK_BYTES) as publisher,
        Middle(publisher.address, lambda index, header, body: [[header, body]]) as middle,
    ):
        # One request under way at a time, through two proxies' hops: a link that carries some tens of MB/s.
        limits = Limits(credit_chunks=1, lost_after_s=LIMITS.lost_after_s)
        engine = Engine("e", middle.address, limits=limits)
        with running(engine):
            publisher.wait_for_subscribers(1)
            reports = []
            for number in range(3):
                tensors["w"].view(torch.int16)[:, number] += 1
                reports.append(publisher.publish(number))
                assert_same_bits(engine.tensors, tensors)
    assert [report.density is None for report in reports] == [True, False, False]
    assert reports[0].delta in ("on", "zstd") and "measured" in reports[0].why
    assert reports[1].ratio is not None and reports[1].ratio > 100


@pytest.mark.parametrize("kwargs", [{"delta": "sometimes"}, {"history": -1}, {"expose": ("telepathy",)}])
def test_settings_that_are_none_are_refused(kwargs: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"sometimes|-1|telepathy"):
        WeightPublisher(TensorSource(make_weights()), TCP, **kwargs)  # type: ignore[arg-type]


def test_a_transport_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="telepathy"):
        WeightSubscriber(TCP, transport="telepathy")


@pytest.mark.parametrize("mode", ["on", "zstd"])
def test_the_simulated_fleet_gets_deltas(mode: str) -> None:
    world = World(FleetPolicy.all(), mode)  # type: ignore[arg-type]
    world.start_engine("a")
    (engine,) = world.engines.values()
    for number in (1, 2, 3):
        world.trainer.number = number
        for rank in (0, 1):
            world.send(world.trainer.begin(rank, world.now_s, 30.0))
        for _ in range(20):
            for rank in (0, 1):
                world.send(world.trainer.pack(rank, 1, world.now_s))
            for _ in range(6):
                world.deliver_up(engine)
                world.note_release()
                world.deliver_down(engine)
                world.deliver_chunk(engine)
            if world.check_take(engine):
                world.commit(engine)
        assert engine.served[-1].number == number
    assert world.seen["dense"] and world.seen["delta" if mode == "on" else "zdelta"] and world.seen["same"]
