"""Engine workers of one host that want slices each: all that any wants is received once, and each gets its own."""

import time

from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_specs, wait_until
from tests.sync.slice_share import (
    CHUNK_BYTES,
    GATHER_S,
    TCP,
    Subscribe,
    change,
    is_member,
    leader_of,
    publish,
    transports,
)
from tests.sync.slice_wants import WantOf, assert_slices, make_layers, slices_of

from weightcast.sync import FleetPolicy, Region, WeightPublisher, WeightSubscriber
from weightcast.sync.cut_source import cut_source
from weightcast.sync.wanted import share_of


def test_two_halves_are_received_once_as_one_model_would_be(sharing: Subscribe) -> None:
    tensors = make_layers(1)
    with WeightPublisher(
        TensorSource(tensors), TCP, policy=FleetPolicy.all(2), chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S
    ) as p:
        engines = {sharing(p.address, f"w{rank}", slices_of(rank, 2), 2): slices_of(rank, 2) for rank in range(2)}
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


def test_what_no_worker_wants_is_not_received(sharing: Subscribe) -> None:
    """Two of four tensor-parallel workers are on this host; the fourth comes as a second life of the same slice."""
    tensors = make_layers(2)
    specs = tuple(make_specs(tensors))
    wants = [slices_of(rank, 4) for rank in range(4)]
    source = cut_source(TensorSource(tensors), [want(specs) for want in wants])
    with WeightPublisher(source, TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {}
        for number, rank in enumerate((1, 2, 2)):
            engines[sharing(p.address, f"w{number}", wants[rank], 3)] = wants[rank]
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


def test_one_who_comes_late_with_other_boxes_and_leaves_again(sharing: Subscribe) -> None:
    """It receives the present version by itself; the next one is received for it too, dense where it is new."""
    tensors = make_layers(3)
    specs = tuple(make_specs(tensors))
    wants = [slices_of(rank, 4) for rank in range(3)]
    source = cut_source(TensorSource(tensors), [want(specs) for want in wants])
    with WeightPublisher(source, TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {
            sharing(p.address, f"w{rank}", wants[rank]): wants[rank] for rank in range(2)
        }
        p.wait_for_subscribers(2)
        quarter = publish(p, 1, tensors, engines).num_bytes / 2
        late = sharing(p.address, "late", wants[2])
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


def test_one_that_wants_all_of_the_model_comes_to_those_that_do_not(sharing: Subscribe) -> None:
    tensors = make_layers(4)
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        half = slices_of(1, 2)
        engines: dict[WeightSubscriber, WantOf | None] = {sharing(p.address, "half", half): half}
        p.wait_for_subscribers(1)
        publish(p, 1, tensors, engines)
        everything = sharing(p.address, "all", None)
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


def test_whoever_receives_leaves_and_another_goes_on_with_what_is_there(sharing: Subscribe) -> None:
    tensors = make_layers(5)
    specs = tuple(make_specs(tensors))
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        wants = [slices_of(rank, 4) for rank in range(4)]
        first = sharing(p.address, "first", wants[0], 4)
        wait_until(lambda: is_member(first))
        others: dict[WeightSubscriber, WantOf | None] = {
            sharing(p.address, f"w{rank}", wants[rank], 4): wants[rank] for rank in (1, 2, 3)
        }
        p.wait_for_subscribers(4)
        publish(p, 1, tensors, {first: wants[0], **others})
        first.close()
        change(tensors, 2)
        report = publish(p, 2, tensors, others)
        assert transports(report) == {"host": 2, "zmq": 1}
        assert report.num_bytes < report.dense_bytes / 4, "what was carried over is what the delta began from"
        again = sharing(p.address, "first", wants[0], 4)
        update = again.wait(WAIT_S)
        assert_slices(update, wants[0](specs), tensors)
        assert update.stats.transport in ("host", "zmq")
        update.commit()
