"""CurveZMQ keys: who has them is served, and nobody else is heard."""

import time
from typing import Any

import pytest
import zmq
from tests.sync.parts import (
    LIMITS,
    WAIT_S,
    Engine,
    TensorSource,
    assert_same_bits,
    make_model,
    on_all,
    publishers,
    running,
)

from weightcast.sync import CurveKeys, PublishReport, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import AddressError, DeadlineExceeded
from weightcast.sync.transports import zmq_sockets

TCP = "tcp://127.0.0.1:0"
SERVER, ENGINE, STRANGER = (zmq.curve_keypair() for _ in range(3))
# Sources share one pair and connect to rank 0 with it, so it is on the list too.
PUBLISHER_KEYS = CurveKeys(*SERVER, server=SERVER[0], allowed=(ENGINE[0], SERVER[0]))


def test_engines_with_the_right_keys_are_served_by_all_sources() -> None:
    tensors = make_model(31)
    with publishers(tensors, 2, TCP, keys=PUBLISHER_KEYS, timeout_s=WAIT_S) as made:
        engine = Engine("engine-0", made[0].address, kwargs={"keys": CurveKeys(*ENGINE, server=SERVER[0])})
        with running(engine):
            made[0].wait_for_subscribers(1)
            reports = on_all(made, lambda publisher: publisher.publish(1))
            assert all(isinstance(report, PublishReport) for report in reports), reports
    assert_same_bits(engine.tensors, tensors)


@pytest.mark.parametrize(
    "keys",
    [CurveKeys(*STRANGER, server=SERVER[0]), CurveKeys(*ENGINE, server=STRANGER[0]), None],
    ids=["a key that is not allowed", "another server's key", "no keys"],
)
def test_others_are_not_heard_and_hear_nothing(keys: CurveKeys | None) -> None:
    with WeightPublisher(TensorSource(make_model(32)), TCP, keys=PUBLISHER_KEYS) as publisher:
        publisher.publish(1)
        with WeightSubscriber(publisher.address, engine="e", keys=keys, limits=LIMITS) as subscriber:
            with pytest.raises(DeadlineExceeded, match="no publisher has answered there"):
                subscriber.wait(0.7)
            assert publisher.fleet() == ()


def test_a_link_refused_before_its_first_message_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine, where libzmq's own thread hears of the refusal before the engine's thread goes on."""

    def connect_and_lag(*args: Any) -> zmq.Socket[bytes]:
        socket = connect(*args)
        time.sleep(0.1)
        return socket

    connect = zmq_sockets.connect
    monkeypatch.setattr(zmq_sockets, "connect", connect_and_lag)
    stranger = CurveKeys(*STRANGER, server=SERVER[0])
    with (
        WeightPublisher(TensorSource(make_model(32)), TCP, keys=PUBLISHER_KEYS) as publisher,
        WeightSubscriber(publisher.address, engine="e", keys=stranger, limits=LIMITS) as subscriber,
    ):
        with pytest.raises(DeadlineExceeded, match="no publisher has answered there"):
            subscriber.wait(1.5)
        assert publisher.fleet() == ()


def test_an_address_beyond_this_machine_needs_keys_and_an_allow_list() -> None:
    source = TensorSource(make_model(33))
    with pytest.raises(AddressError, match="from other machines"):
        WeightPublisher(source, "tcp://0.0.0.0:0")
    with pytest.raises(AddressError, match="allow nobody"):
        WeightPublisher(source, "tcp://0.0.0.0:0", keys=CurveKeys(*SERVER))
    with WeightPublisher(source, "tcp://0.0.0.0:0", keys=PUBLISHER_KEYS) as publisher:
        assert publisher.address.startswith("tcp://0.0.0.0:")
