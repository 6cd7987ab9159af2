"""Engine workers of one host that receive each version once: whoever is slow, stuck, late or replaced.

What becomes of killed processes is in `test_shared_copy_killed.py`.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tests.sync.haste import check_haste
from tests.sync.middle import Middle
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, make_model
from tests.sync.slice_wants import WantOf

from weightcast.sync import FleetPolicy, HostShare, PublishReport, Update, Version, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import ConfigError, VersionError, WireError

TCP = "tcp://127.0.0.1:0"
ROWS, HASTY_ROWS = 2000, 400
Subscribe = Callable[..., WeightSubscriber]


@pytest.fixture
def subscribe(base: Path) -> Iterator[Subscribe]:
    """Makes workers of this host that share a copy, and end with the test."""
    with ExitStack() as stack:

        def make(address: str, name: str, *, lease_s: float = 30.0, **settings: object) -> WeightSubscriber:
            share = HostShare("engine", lease_s=lease_s, base=base)
            made = WeightSubscriber(address, engine=name, limits=LIMITS, share=share, **settings)  # type: ignore[arg-type]
            return stack.enter_context(made)

        yield make


def is_member(subscriber: WeightSubscriber) -> bool:
    """Whether it has joined the workers of its host."""
    worker = subscriber._loop._worker
    return worker is not None and worker._member is not None


def publish(
    publisher: WeightPublisher, number: int, tensors: dict[str, torch.Tensor], engines: Sequence[WeightSubscriber]
) -> PublishReport:
    """Publish `tensors`, and let these engines take and commit them; each must get their bits."""
    publication = publisher.begin(number)
    for engine in engines:
        update = engine.wait(WAIT_S)
        assert update.version.number == number
        assert_same_bits(dict(update), tensors)
        update.commit()
    return publication.wait()


def transports(report: PublishReport) -> Counter[str]:
    """How many engines received it how."""
    return Counter(engine.transport for engine in report.engines)


def change(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Other bits in a few elements."""
    for tensor in tensors.values():
        raw = tensor.reshape(-1).view(torch.uint8)
        raw[seed % 7 :: 211] ^= 1 if tensor.dtype is torch.bool else 0x5A


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails the test when it does not come true."""
    end_s = time.monotonic() + 2 * WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_one_worker_receives_and_each_is_an_engine_of_its_own(subscribe: Subscribe) -> None:
    tensors = make_model(1, ROWS)
    with WeightPublisher(TensorSource(tensors), TCP, policy=FleetPolicy.all(3), delta="on", timeout_s=WAIT_S) as p:
        engines = [subscribe(p.address, name, transport="zmq") for name in "abc"]
        for number in (1, 2, 3):
            change(tensors, number)
            report = publish(p, number, tensors, engines)
            assert sorted(report.serving) == ["a", "b", "c"]
            assert transports(report) == {"host": 2, "zmq": 1}
            (receiver,) = (engine for engine in report.engines if engine.transport != "host")
            assert report.num_bytes == receiver.num_bytes and report.receiving == (receiver.engine,)
            assert number == 1 or 0 < report.num_bytes < report.dense_bytes / 4, "a delta, on the shared copy"
        late = subscribe(p.address, "late")
        update = late.wait(WAIT_S)
        assert (update.version.number, update.stats.transport) == (3, "host")
        assert_same_bits(dict(update), tensors)
        assert update.specs == tuple(TensorSource(tensors).specs())
        update.commit()


def test_a_copy_is_left_alone_while_a_worker_loads_it(subscribe: Subscribe, caplog: pytest.LogCaptureFixture) -> None:
    """The next version waits for it, and pings go on meanwhile: the fleet misses nobody."""
    tensors = make_model(1, ROWS)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    policy = FleetPolicy.quorum(1)
    with WeightPublisher(TensorSource(tensors), TCP, policy=policy, lost_after_s=4.0, timeout_s=60) as p:
        engines = [subscribe(p.address, name) for name in "ab"]
        p.wait_for_subscribers(2)
        publication = p.begin(1, timeout_s=4.0)
        updates = [engine.wait(WAIT_S) for engine in engines]
        updates[0].commit()
        publication.wait()
        change(tensors, 2)
        second = p.begin(2)
        time.sleep(6.0)
        next_version = Version(updates[0].version.epoch, 2)
        assert [engine.state(next_version) for engine in p.fleet()] == ["staging", "staging"]
        assert_same_bits(dict(updates[1]), before)
        updates[1].release()
        update = engines[0].wait(WAIT_S)
        assert_same_bits(dict(update), tensors)
        update.commit()
        updates[1].commit()
        update = engines[1].wait(WAIT_S)
        assert_same_bits(dict(update), tensors)
        update.commit()
        second.wait()
    assert "kept version" not in caplog.text


@pytest.mark.parametrize("stuck_number", [0, 1], ids=["the one that receives", "one that reads"])
def test_an_engine_that_never_commits_holds_the_others_for_its_lease_only(
    subscribe: Subscribe, stuck_number: int, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = make_model(1, ROWS)
    with WeightPublisher(TensorSource(tensors), TCP, policy=FleetPolicy.quorum(1), timeout_s=60) as p:
        engines = [subscribe(p.address, "engine-0", lease_s=1.0)]
        wait_until(lambda: is_member(engines[0]))
        engines.append(subscribe(p.address, "engine-1", lease_s=1.0))
        p.wait_for_subscribers(2)
        publication = p.begin(1, timeout_s=4.0)
        updates = [engine.wait(WAIT_S) for engine in engines]
        assert [update.stats.transport for update in updates] == ["shared_memory", "host"]
        stuck, quick = engines[stuck_number], engines[1 - stuck_number]
        updates[1 - stuck_number].commit()
        publication.wait()
        change(tensors, 2)
        second = p.begin(2, timeout_s=20.0)
        update = quick.wait(WAIT_S)
        assert_same_bits(dict(update), tensors)
        update.commit()
        assert "kept version 1" in caplog.text and "it is overwritten" in caplog.text
        with pytest.raises(VersionError, match=r"version 1 .* was overwritten while it was read: the lease was kept"):
            updates[stuck_number].check()
        with pytest.raises(VersionError, match="was overwritten while it was read"):
            updates[stuck_number].commit()
        assert stuck.serving is None and stuck.is_fenced
        update = stuck.wait(WAIT_S)
        assert update.version.number == 2
        assert_same_bits(dict(update), tensors)
        update.commit()
        # The one that receives had staged it while its engine was stuck, so the publication waits for it.
        assert set(second.wait().serving) >= ({"engine-0", "engine-1"} if stuck is engines[0] else {"engine-0"})
        wait_until(lambda: all(engine.serving == update.version for engine in p.fleet()))


def test_a_rejected_version_is_let_go_of(subscribe: Subscribe) -> None:
    tensors = make_model(1, ROWS)
    with WeightPublisher(TensorSource(tensors), TCP, policy=FleetPolicy.quorum(1), timeout_s=WAIT_S) as p:
        engines = [subscribe(p.address, name) for name in "ab"]
        p.wait_for_subscribers(2)
        publication = p.begin(1)
        updates = [engine.wait(WAIT_S) for engine in engines]
        updates[0].reject("no room")
        updates[1].commit()
        assert publication.wait().serving == ("b",)
        change(tensors, 2)
        # One is enough to end it: the other may still be on its way then.
        assert publish(p, 2, tensors, engines).serving
        assert [engine.serving.number for engine in engines if engine.serving] == [2, 2]


def test_what_the_receiver_refuses_the_others_refuse_with_its_reason(subscribe: Subscribe) -> None:
    tensors = make_model(1, ROWS)
    with (
        WeightPublisher(TensorSource(tensors), TCP, policy=FleetPolicy.quorum(2), timeout_s=WAIT_S) as p,
        Middle(p.address) as middle,
    ):
        engines = [subscribe(middle.address, name) for name in "ab"]
        p.wait_for_subscribers(2)
        middle.alter = lambda index, header, body: [[header, b"x" + body[1:]]]
        publication = p.begin(1, timeout_s=5.0)
        errors = []
        for engine in engines:
            with pytest.raises(WireError) as error:
                engine.wait(WAIT_S)
            errors.append(str(error.value))
        (read,) = (text for text in errors if "which receives for engine" in text)
        (own,) = (text for text in errors if text != read)
        assert "its bytes were altered" in own and own in read
        with pytest.raises(Exception, match="did not reach the fleet"):
            publication.wait()
        middle.alter = lambda index, header, body: [[header, body]]
        assert sorted(publish(p, 2, tensors, engines).serving) == ["a", "b"]
        late = subscribe(middle.address, "late")
        assert late.wait(WAIT_S).version.number == 2


def test_a_publisher_that_is_replaced_also_by_one_of_another_model(subscribe: Subscribe) -> None:
    with WeightPublisher(TensorSource(make_model(1, ROWS)), TCP, timeout_s=WAIT_S) as first:
        address = first.address
        engines = [subscribe(address, name) for name in "abc"]
        first.wait_for_subscribers(3)
        publish(first, 1, make_model(1, ROWS), engines)
    for seed, rows in ((2, ROWS), (3, ROWS + 8)):
        with WeightPublisher(TensorSource(make_model(seed, rows)), address, timeout_s=2 * WAIT_S) as next_one:
            next_one.wait_for_subscribers(3)
            take = lambda engine: engine.wait(WAIT_S)  # noqa: E731
            publication = next_one.begin(1)
            for engine in engines:
                update = _patient(engine, take)
                assert_same_bits(dict(update), make_model(seed, rows))
                update.commit()
            assert transports(publication.wait()) == {"host": 2, "shared_memory": 1}


def _patient(engine: WeightSubscriber, take: Callable[[WeightSubscriber], Update]) -> Update:
    """The next version, whatever is first said of the publisher that went."""
    try:
        return take(engine)
    except ConnectionError:
        return take(engine)


def test_a_worker_that_leaves_hands_over_what_it_received(subscribe: Subscribe) -> None:
    tensors = make_model(1, ROWS)
    with WeightPublisher(TensorSource(tensors), TCP, delta="on", timeout_s=WAIT_S) as p:
        first = subscribe(p.address, "first", transport="zmq")
        wait_until(lambda: is_member(first))
        others = [subscribe(p.address, name, transport="zmq") for name in "ab"]
        p.wait_for_subscribers(3)
        publish(p, 1, tensors, [first, *others])
        first.close()
        change(tensors, 2)
        report = publish(p, 2, tensors, others)
        assert transports(report) == {"host": 1, "zmq": 1}
        assert report.num_bytes < report.dense_bytes / 4, "what was carried over is what the delta began from"


def test_a_host_without_such_memory_is_received_on_all_the_same(
    base: Path, subscribe: Subscribe, caplog: pytest.LogCaptureFixture
) -> None:
    folder = base / f"weightcast-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    caplog.set_level(logging.WARNING)
    tensors = make_model(1, ROWS)
    with WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S) as p:
        engines = [subscribe(p.address, name) for name in "ab"]
        p.wait_for_subscribers(2)
        for number in (1, 2):
            change(tensors, number)
            assert transports(publish(p, number, tensors, engines)) == {"shared_memory": 2}
    assert "receives by itself, not with the workers of its host: other users can write to" in caplog.text


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="an observer receives nothing that it could share"):
        WeightSubscriber(TCP, role="observer", share="engine")
    for settings in ({"group": ""}, {"group": "g", "lease_s": 0.0}):
        with pytest.raises(ConfigError, match="a host's share needs a name and a lease_s above 0"):
            HostShare(**settings)


def test_versions_in_haste_and_workers_that_come_and_go_never_mix(base: Path) -> None:
    """Roles change hands all the time; whatever an engine took is one version's bits."""

    def check(update: Update, _: WantOf | None) -> None:
        assert_same_bits(dict(update), make_model(update.version.number, HASTY_ROWS))

    check_haste(base, lambda number: make_model(number, HASTY_ROWS), lambda _: ({}, None), check)
