"""Engine workers of one host that want slices each: all that any wants is received once, and each gets its own."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, bits, make_specs, wait_until
from tests.sync.slice_wants import NUM_LAYERS, WantOf, assert_slices, make_layers, slices_of

from weightcast.sync import FleetPolicy, HostShare, PublishReport, Region, WeightPublisher, WeightSubscriber
from weightcast.sync.cut_source import cut_source
from weightcast.sync.errors import ConfigError, StorageError
from weightcast.sync.host import leader as leaders
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.pool import SharedPool
from weightcast.sync.host.worker import HostWorker
from weightcast.sync.wanted import Want, WantedRegions, share_of, whole

TCP = "tcp://127.0.0.1:0"
CHUNK_BYTES = 4096
# Those who come within this time are received for together; tests that cannot wait for more say how many come.
GATHER_S = 0.5
Subscribe = Callable[..., WeightSubscriber]


@pytest.fixture
def subscribe(base: Path) -> Iterator[Subscribe]:
    """Makes workers of this host that share a copy, and end with the test."""
    with ExitStack() as stack:

        def make(
            address: str, name: str, want: Want | None, workers: int | None = None, lease_s: float = 30.0
        ) -> WeightSubscriber:
            share = HostShare("engine", base=base, workers=workers, gather_s=GATHER_S, lease_s=lease_s)
            made = WeightSubscriber(address, engine=name, limits=LIMITS, share=share, want=want, transport="zmq")
            return stack.enter_context(made)

        yield make


def leader_of(engines: Sequence[WeightSubscriber]) -> HostLeader:
    """Of those that lead, the one."""
    workers = [engine._loop._worker for engine in engines]
    (member,) = (w._member for w in workers if w is not None and isinstance(w._member, HostLeader))
    return member


def is_member(engine: WeightSubscriber) -> bool:
    """Whether it has joined the workers of its host."""
    worker = engine._loop._worker
    return worker is not None and worker._member is not None


def publish(
    publisher: WeightPublisher,
    number: int,
    tensors: dict[str, torch.Tensor],
    engines: Mapping[WeightSubscriber, WantOf | None],
) -> PublishReport:
    """Publish; each engine takes what it wants, and commits."""
    publication = publisher.begin(number)
    for engine, want in engines.items():
        update = engine.wait(WAIT_S)
        assert update.version.number == number
        if want is None:
            assert update.wanted is None
            assert_same_bits(dict(update), tensors)
        else:
            assert_slices(update, want(update.specs), tensors)
        update.commit()
    return publication.wait()


def change(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Other bits in a few elements of every tensor."""
    for tensor in tensors.values():
        bits(tensor)[seed % 7 :: 211] ^= 0x5A


def transports(report: PublishReport) -> Counter[str]:
    """How many engines received it how."""
    return Counter(engine.transport for engine in report.engines)


def test_two_halves_are_received_once_as_one_model_would_be(subscribe: Subscribe) -> None:
    tensors = make_layers(1)
    with WeightPublisher(
        TensorSource(tensors), TCP, policy=FleetPolicy.all(2), chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S
    ) as p:
        engines = {subscribe(p.address, f"w{rank}", slices_of(rank, 2), 2): slices_of(rank, 2) for rank in range(2)}
        for number in (1, 2, 3):
            change(tensors, number)
            report = publish(p, number, tensors, engines)
            assert transports(report) == {"host": 1, "zmq": 1}
            (receiver,) = (line for line in report.engines if line.transport == "zmq")
            assert report.receiving == (receiver.engine,) and report.num_bytes == receiver.num_bytes
            assert receiver.asked_bytes == report.dense_bytes, "together they want all of the model"
            if number == 1:
                assert report.num_bytes == report.dense_bytes, "each byte once"
            else:
                assert 0 < report.num_bytes < report.dense_bytes / 4, "a delta, although both want cut matrices"
        assert leader_of(list(engines)).pool.wanted is None


def test_what_no_worker_wants_is_not_received(subscribe: Subscribe) -> None:
    """Two of four tensor-parallel workers are on this host; the fourth comes as a second life of the same slice."""
    tensors = make_layers(2)
    specs = tuple(make_specs(tensors))
    wants = [slices_of(rank, 4) for rank in range(4)]
    source = cut_source(TensorSource(tensors), [want(specs) for want in wants])
    with WeightPublisher(source, TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {}
        for number, rank in enumerate((1, 2, 2)):
            engines[subscribe(p.address, f"w{number}", wants[rank], 3)] = wants[rank]
        p.wait_for_subscribers(3)
        received = []
        for number in (1, 2):
            change(tensors, number)
            report = publish(p, number, tensors, engines)
            assert transports(report) == {"host": 2, "zmq": 1}
            received.append(report.num_bytes)
        pool = leader_of(list(engines)).pool
        assert pool.wanted is not None and 0.49 < share_of(pool.wanted, specs) < 0.52
        assert pool.wanted["0.up"] == (Region("0.up", (32, 0), (64, 96)),), "neighbours are one box"
        assert pool.num_bytes < 0.55 * report.dense_bytes + 8192
        assert 0.5 * report.dense_bytes < received[0] < 0.6 * report.dense_bytes
        assert received[1] < 0.2 * received[0]


def test_one_who_comes_late_with_other_boxes_and_leaves_again(subscribe: Subscribe) -> None:
    """It receives the present version by itself; the next one is received for it too, dense where it is new."""
    tensors = make_layers(3)
    specs = tuple(make_specs(tensors))
    wants = [slices_of(rank, 4) for rank in range(3)]
    source = cut_source(TensorSource(tensors), [want(specs) for want in wants])
    with WeightPublisher(source, TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {
            subscribe(p.address, f"w{rank}", wants[rank]): wants[rank] for rank in range(2)
        }
        p.wait_for_subscribers(2)
        quarter = publish(p, 1, tensors, engines).num_bytes / 2
        late = subscribe(p.address, "late", wants[2])
        update = late.wait(WAIT_S)
        assert (update.version.number, update.stats.transport) == (1, "zmq")
        assert_slices(update, wants[2](specs), tensors)
        assert 0.8 * quarter < update.stats.num_bytes < 1.3 * quarter
        update.commit()
        engines[late] = wants[2]
        received = []
        for number in (2, 3):
            change(tensors, number)
            report = publish(p, number, tensors, engines)
            assert transports(report) == {"host": 2, "zmq": 1}
            received.append(report.num_bytes)
        leader = leader_of(list(engines))
        assert leader.pool.wanted is not None and share_of(leader.pool.wanted, specs) > 0.74
        assert 0.9 * quarter < received[0] < 1.4 * quarter, "what is new comes whole, the rest as what changed"
        assert received[1] < 0.3 * quarter
        del engines[late]
        late.close()
        change(tensors, 4)
        assert publish(p, 4, tensors, engines).num_bytes < 0.3 * quarter, "nothing is received anew because one left"
        time.sleep(1.1 * GATHER_S)
        change(tensors, 5)
        assert publish(p, 5, tensors, engines).num_bytes < 0.3 * quarter, "nor when that is left out"
        assert leader.pool.wanted is not None and share_of(leader.pool.wanted, specs) < 0.52


def test_one_that_wants_all_of_the_model_comes_to_those_that_do_not(subscribe: Subscribe) -> None:
    tensors = make_layers(4)
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        half = slices_of(1, 2)
        engines: dict[WeightSubscriber, WantOf | None] = {subscribe(p.address, "half", half): half}
        p.wait_for_subscribers(1)
        publish(p, 1, tensors, engines)
        everything = subscribe(p.address, "all", None)
        update = everything.wait(WAIT_S)
        assert update.wanted is None and update.stats.transport == "zmq"
        assert_same_bits(dict(update), tensors)
        update.commit()
        engines[everything] = None
        for number in (2, 3):
            change(tensors, number)
            report = publish(p, number, tensors, engines)
            assert transports(report) == {"host": 1, "zmq": 1}
        assert leader_of(list(engines)).pool.wanted is None and report.num_bytes < report.dense_bytes / 4


def test_whoever_receives_leaves_and_another_goes_on_with_what_is_there(subscribe: Subscribe) -> None:
    tensors = make_layers(5)
    specs = tuple(make_specs(tensors))
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        wants = [slices_of(rank, 4) for rank in range(4)]
        first = subscribe(p.address, "first", wants[0], 4)
        wait_until(lambda: is_member(first))
        others: dict[WeightSubscriber, WantOf | None] = {
            subscribe(p.address, f"w{rank}", wants[rank], 4): wants[rank] for rank in (1, 2, 3)
        }
        p.wait_for_subscribers(4)
        publish(p, 1, tensors, {first: wants[0], **others})
        first.close()
        change(tensors, 2)
        report = publish(p, 2, tensors, others)
        assert transports(report) == {"host": 2, "zmq": 1}
        assert report.num_bytes < report.dense_bytes / 4, "what was carried over is what the delta began from"
        again = subscribe(p.address, "first", wants[0], 4)
        update = again.wait(WAIT_S)
        assert_slices(update, wants[0](specs), tensors)
        assert update.stats.transport in ("host", "zmq")
        update.commit()


@pytest.mark.parametrize("is_staged", [True, False], ids=["with its version", "without"])
def test_the_heir_wants_boxes_that_the_one_before_did_not_receive(
    subscribe: Subscribe, monkeypatch: pytest.MonkeyPatch, is_staged: bool
) -> None:
    """Its own version, received by itself, is not the host's; and what it lacks of the host's it fetches."""
    tensors = make_layers(8)
    wants = [slices_of(rank, 4) for rank in range(2)]
    specs = tuple(make_specs(tensors))
    source = cut_source(TensorSource(tensors), [want(specs) for want in wants])
    with WeightPublisher(source, TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        first = subscribe(p.address, "first", wants[0])
        p.wait_for_subscribers(1)
        quarter = publish(p, 1, tensors, {first: wants[0]}).num_bytes
        if not is_staged:
            monkeypatch.setattr(HostWorker, "_receive", lambda *_: [])  # it has not begun when the other one leaves
        heir = subscribe(p.address, "heir", wants[1])
        if is_staged:
            wait_until(lambda: any(e.engine == "heir" and e.staged is not None for e in p.fleet()))
        else:
            wait_until(lambda: is_member(heir))
        first.close()
        wait_until(lambda: heir._loop._worker is not None and isinstance(heir._loop._worker._member, HostLeader))
        monkeypatch.undo()
        update = heir.wait(WAIT_S)
        assert (update.version.number, update.stats.transport) == (1, "zmq")
        assert_slices(update, wants[1](specs), tensors)
        assert 0.8 * quarter < update.stats.num_bytes < 1.3 * quarter, "its own, and not the host's once more"
        update.commit()
        change(tensors, 2)
        again = subscribe(p.address, "first", wants[0])
        update = again.wait(WAIT_S)
        assert update.stats.transport == "host", "which has it still"
        assert_slices(update, wants[0](specs), make_layers(8))
        update.commit()
        report = publish(p, 2, tensors, {heir: wants[1], again: wants[0]})
        assert transports(report) == {"host": 1, "zmq": 1}
        assert report.num_bytes < (1.5 if is_staged else 0.5) * quarter


def test_who_loads_for_longer_than_its_lease_when_the_union_grows_has_what_it_took(
    subscribe: Subscribe, caplog: pytest.LogCaptureFixture
) -> None:
    """The next version comes to other memory, so nothing was overwritten under it; nobody waits for it any longer."""
    tensors = make_layers(9)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    wants = [slices_of(rank, 4) for rank in range(3)]
    specs = tuple(make_specs(tensors))
    policy = FleetPolicy.quorum(1)
    with WeightPublisher(TensorSource(tensors), TCP, policy=policy, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as p:
        first = subscribe(p.address, "first", wants[0], 2, lease_s=0.5)
        wait_until(lambda: is_member(first))
        slow = subscribe(p.address, "slow", wants[1], 2, lease_s=0.5)
        p.wait_for_subscribers(2)
        publication = p.begin(1, timeout_s=2.0)
        held = slow.wait(WAIT_S)
        first.wait(WAIT_S).commit()
        publication.wait()
        late = subscribe(p.address, "late", wants[2], 2, lease_s=0.5)
        late.wait(WAIT_S).commit()
        change(tensors, 2)
        publication = p.begin(2, timeout_s=10.0)
        for engine, want in ((first, wants[0]), (late, wants[2])):
            update = engine.wait(WAIT_S)
            assert_slices(update, want(specs), tensors)
            update.commit()
        assert "kept version 1" in caplog.text
        held.check()
        assert_slices(held, wants[1](specs), before)
        held.commit()
        update = slow.wait(WAIT_S)
        assert (update.version.number, update.stats.transport) == (2, "host")
        assert_slices(update, wants[1](specs), tensors)
        update.commit()
        publication.wait()


def cross(specs: Sequence) -> WantedRegions:  # type: ignore[type-arg]
    """Some rows of every matrix."""
    return {s.name: (Region(s.name, (8, 0), (16, s.shape[1])),) if len(s.shape) == 2 else () for s in specs}


def test_boxes_that_cross_those_of_another_are_put_together(subscribe: Subscribe) -> None:
    tensors = make_layers(6)
    columns: WantOf = lambda specs: {  # noqa: E731
        s.name: (Region(s.name, (0, 5), (s.shape[0], 7)),) if len(s.shape) == 2 else (s.whole(),) for s in specs
    }
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {
            subscribe(p.address, name, want, 2): want for name, want in (("rows", cross), ("columns", columns))
        }
        p.wait_for_subscribers(2)
        for number in (1, 2):
            change(tensors, number)
            assert transports(publish(p, number, tensors, engines)) == {"host": 1, "zmq": 1}


def test_without_memory_for_a_larger_union_the_present_one_goes_on(
    subscribe: Subscribe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = make_layers(7)
    wants = [slices_of(rank, 4) for rank in range(2)]
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {subscribe(p.address, "w0", wants[0]): wants[0]}
        p.wait_for_subscribers(1)
        publish(p, 1, tensors, engines)
        late = subscribe(p.address, "late", wants[1])
        late.wait(WAIT_S).commit()
        engines[late] = wants[1]

        def fail(*_: object) -> SharedPool:
            raise StorageError(12, "no memory for the weights")

        monkeypatch.setattr(leaders, "make_pool", fail)
        caplog.set_level(logging.WARNING)
        report = publish(p, 2, tensors, engines)
        assert transports(report) == {"zmq": 2} and "what all want does not fit" in caplog.text
        monkeypatch.undo()
        assert transports(publish(p, 3, tensors, engines)) == {"host": 1, "zmq": 1}


def test_the_first_version_is_refused_where_there_is_no_memory_for_it(
    subscribe: Subscribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> SharedPool:
        raise StorageError(12, "no memory for the weights")

    tensors = make_layers(7)
    wants = [slices_of(rank, 4) for rank in range(2)]
    with WeightPublisher(TensorSource(tensors), TCP, policy=FleetPolicy.quorum(2), timeout_s=WAIT_S) as p:
        monkeypatch.setattr(leaders, "make_pool", fail)
        engines: dict[WeightSubscriber, WantOf | None] = {
            subscribe(p.address, f"w{rank}", wants[rank], 2): wants[rank] for rank in range(2)
        }
        p.wait_for_subscribers(2)
        publication = p.begin(1)
        for engine in engines:
            with pytest.raises(ValueError, match=r"cannot receive for its host: .* no memory for the weights"):
                engine.wait(WAIT_S)
        with pytest.raises(Exception, match="did not reach the fleet"):
            publication.wait()
        monkeypatch.undo()
        assert transports(publish(p, 2, tensors, engines)) == {"host": 1, "zmq": 1}


def test_terms_of_a_share_are_checked() -> None:
    for settings in ({"workers": 0}, {"gather_s": -1.0}, {"gather_s": float("inf")}):
        with pytest.raises(ConfigError, match="needs workers of at least 1 or None, and seconds for gather_s"):
            HostShare("engine", **settings)


def test_versions_in_haste_and_workers_with_other_slices_each_time_never_mix(base: Path) -> None:
    """Unions grow, shrink and are handed on all the time; all that an engine took is one version's bits."""
    tensors = make_layers(0)
    specs = tuple(make_specs(tensors))
    stop, taken, faults = threading.Event(), Counter[str](), list[str]()

    def follow(address: str, name: str, seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            want = dice.choice([None, whole, *(slices_of(rank, 4) for rank in range(4)), slices_of(1, 2), cross])
            share = HostShare("engine", base=base, gather_s=dice.choice([0.0, 0.05]))
            with WeightSubscriber(address, engine=name, limits=LIMITS, share=share, want=want) as subscriber:
                for _ in range(dice.randrange(2, 9)):
                    try:
                        update = subscriber.wait(0.5)
                    except TimeoutError:
                        continue
                    if stop.wait(dice.choice([0.0, 0.0, 0.02])):
                        return
                    try:
                        expected = make_layers(update.version.number)
                        if want is None:
                            assert_same_bits(dict(update), expected)
                        else:
                            assert_slices(update, want(specs), expected)
                    except AssertionError as error:
                        faults.append(f"{name}, version {update.version}: {error!r}")
                    taken[update.stats.transport] += 1
                    update.commit()

    policy = FleetPolicy.quorum(1)
    with WeightPublisher(
        TensorSource(tensors), TCP, policy=policy, delta="on", chunk_bytes=CHUNK_BYTES, timeout_s=60
    ) as p:
        threads = [threading.Thread(target=follow, args=(p.address, f"e{seed}", seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for number in range(1, 61):
            for name, tensor in make_layers(number).items():
                tensors[name].copy_(tensor)
            p.publish(number)
        stop.set()
        for thread in threads:
            thread.join(2 * WAIT_S)
            assert not thread.is_alive()
    assert faults == []
    assert taken["host"] > 10 and taken["shared_memory"] > 10 and len(tensors) == 1 + 3 * NUM_LAYERS, taken
