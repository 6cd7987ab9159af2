"""Publishers and subscribers over real sockets: what is published arrives, bit-equal and in step."""

import time
from operator import methodcaller

import pytest
import torch
from tests.sync.parts import (
    LIMITS,
    WAIT_S,
    Engine,
    TensorSource,
    assert_same_bits,
    make_model,
    make_specs,
    on_all,
    publishers,
    running,
)

from weightcast.sync import (
    FleetPolicy,
    ModuleSource,
    PublishReport,
    WeightPublisher,
    WeightSubscriber,
)
from weightcast.sync.errors import (
    DeadlineExceeded,
    PeerLost,
    SourceError,
    VersionError,
)

CHUNK_BYTES = 4096
TCP = "tcp://127.0.0.1:0"


@pytest.mark.parametrize(("num_sources", "num_engines"), [(1, 1), (2, 3)])
def test_engines_follow_versions_bit_for_bit(address: str, num_sources: int, num_engines: int) -> None:
    tensors = make_model(1)
    with publishers(tensors, num_sources, address, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as made:
        engines = [Engine(f"engine-{index}", made[0].address) for index in range(num_engines)]
        with running(*engines):
            made[0].wait_for_subscribers(num_engines)
            for number in (1, 2, 7):
                for name, tensor in make_model(number).items():
                    tensors[name].copy_(tensor)
                reports = on_all(made, methodcaller("publish", number))
                for engine in engines:
                    assert_same_bits(engine.tensors, make_model(number))
        report = reports[0]
        assert isinstance(report, PublishReport), report
        assert all(isinstance(other, PublishReport) and other.engines == report.engines for other in reports)
    assert [engine.numbers for engine in engines] == [[1, 2, 7]] * num_engines
    assert [engine.errors for engine in engines] == [[]] * num_engines
    assert sorted(report.serving) == [engine.name for engine in engines]
    model_bytes = sum(spec.num_bytes for spec in make_specs(tensors))
    assert report.version.number == 7 and report.num_tensors == len(tensors)
    assert report.num_bytes >= num_engines * model_bytes
    assert set(report.phases_s) == {"pack", "stage", "commit"} and min(report.phases_s.values()) >= 0
    for line in report.engines:
        assert line.pause_s == 0.25 and {span.phase for span in line.spans} == {"stage", "check", "swap"}
        assert line.checksums_checked >= len(tensors) and line.num_repeats == 0 and line.transport


def test_a_module_is_published_with_its_ties_once() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6))
    module[1].weight = module[0].weight
    with WeightPublisher(ModuleSource(module), TCP, timeout_s=WAIT_S) as publisher:
        engine = Engine("engine-0", publisher.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            publisher.publish(0)
    state = module.state_dict()
    assert_same_bits(engine.tensors, {name: state[name] for name in state if name != "1.weight"})


def test_a_late_engine_gets_the_current_version_without_the_trainer() -> None:
    tensors = make_model(3)
    with WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S) as publisher:
        assert publisher.publish(5).engines == ()
        wanted = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.zero_()
        with WeightSubscriber(publisher.address, engine="late", limits=LIMITS) as subscriber:
            assert subscriber.specs(WAIT_S) == tuple(make_specs(tensors))
            update = subscriber.wait(WAIT_S)
            assert_same_bits(dict(update), wanted)
            assert update.version.number == 5 and len(update) == len(tensors)
            assert update.stats.num_bytes >= publisher.num_bytes
            assert update.stats.started_at_s <= update.stats.staged_at_s <= time.time()
            assert subscriber.is_fenced and subscriber.serving is None
            update.commit()
            assert not subscriber.is_fenced and subscriber.serving == update.version
            with pytest.raises(DeadlineExceeded, match=r"'late' waited 0.1 s .* no version newer than 5"):
                subscriber.wait(0.1)


def test_an_engine_leaves_and_comes_back() -> None:
    tensors = make_model(4)
    with WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S) as publisher:
        for number in (1, 2):
            engine = Engine("engine-0", publisher.address)
            with running(engine):
                publisher.wait_for_subscribers(1)
                assert publisher.publish(number).serving == ("engine-0",)
            assert engine.numbers[-1] == number
        deadline_s = time.monotonic() + WAIT_S
        while publisher.fleet():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert publisher.publish(3).engines == ()


def test_one_update_at_a_time_and_only_once() -> None:
    with WeightPublisher(TensorSource(make_model(5)), TCP) as publisher:
        publisher.publish(1)
        with WeightSubscriber(publisher.address, limits=LIMITS) as subscriber:
            update = subscriber.wait(WAIT_S)
            with pytest.raises(VersionError, match="still being loaded"):
                subscriber.wait(0.1)
            kept = dict(update)
            update.commit()
            for again in (update.commit, lambda: update.reject("no"), lambda: list(update)):
                with pytest.raises(VersionError, match="committed or rejected already"):
                    again()
            assert_same_bits(kept, make_model(5))


def test_a_closed_subscriber_says_so() -> None:
    with WeightPublisher(TensorSource(make_model(5)), TCP) as publisher:
        publisher.publish(1)
        with WeightSubscriber(publisher.address, limits=LIMITS) as subscriber:
            update = subscriber.wait(WAIT_S)
        with pytest.raises(PeerLost, match="closed"):
            update.commit()
        subscriber.close()
    publisher.close()
    with pytest.raises(SourceError, match="closed"):
        publisher.publish(2)


@pytest.mark.parametrize("number", [3, 2, 0, -1, 1 << 64])
def test_a_version_that_does_not_rise_is_refused(number: int) -> None:
    with WeightPublisher(TensorSource(make_model(6)), TCP) as publisher:
        publisher.publish(3)
        with pytest.raises(VersionError, match="does not rise above 3"):
            publisher.publish(number)
        assert publisher.publish(4).version.number == 4


def test_observers_are_told_and_receive_no_bytes() -> None:
    with WeightPublisher(TensorSource(make_model(7)), TCP, timeout_s=WAIT_S) as publisher:
        engine = Engine("engine-0", publisher.address)
        observer = Engine("driver", publisher.address, kwargs={"role": "observer"})
        with running(engine, observer):
            publisher.wait_for_subscribers(1)
            while len(publisher.fleet()) < 2:
                time.sleep(0.01)
            report = publisher.publish(1)
    assert observer.numbers == [1] and observer.tensors == {}
    lines = {line.engine: line for line in report.engines}
    assert lines["driver"].state == "serving" and lines["driver"].num_bytes == 0 and lines["driver"].pause_s == 0.25
    assert lines["engine-0"].num_bytes == report.num_bytes > 0


def test_under_a_quorum_a_slow_engine_is_fenced_until_it_catches_up() -> None:
    tensors = make_model(8)
    with WeightPublisher(TensorSource(tensors), TCP, policy=FleetPolicy.quorum(1), timeout_s=2.0) as publisher:
        quick = Engine("quick", publisher.address)
        with running(quick), WeightSubscriber(publisher.address, engine="slow", limits=LIMITS) as slow:
            publisher.wait_for_subscribers(2)
            publisher.publish(1)
            held = slow.wait(WAIT_S)
            held.commit()
            while any(status.serving is None for status in publisher.fleet()):
                time.sleep(0.01)
            publisher.publish(2, timeout_s=1.0)
            loading = slow.wait(WAIT_S)
            report = publisher.publish(3, timeout_s=1.0)
            assert {line.engine: line.state for line in report.engines} == {"quick": "serving", "slow": "fenced"}
            assert slow.is_fenced
            loading.commit()
            assert loading.version.number == 2 and slow.is_fenced
            caught_up = slow.wait(WAIT_S)
            assert caught_up.version.number == 3
            caught_up.commit()
            assert not slow.is_fenced
