"""When versions come by broadcast, and when not: deltas, what auto takes, and who is refused."""

import logging
import threading
from typing import Any

import pytest
import torch
from tests.sync.broadcast_parts import (
    BY_BROADCAST,
    TCP,
    change,
    generation_of,
    make_engine,
    make_large,
    publish_all,
    wait_for_engines,
)
from tests.sync.parts import (
    WAIT_S,
    TensorSource,
    assert_same_bits,
    make_model,
    running,
    wait_until,
)

from weightcast.sync import WeightPublisher, WeightSubscriber
from weightcast.sync.errors import ConfigError, EngineError


def test_what_goes_as_changes_is_asked_for() -> None:
    tensors = make_large(8)
    with WeightPublisher(TensorSource(tensors), TCP, **BY_BROADCAST | {"delta": "on"}) as publisher:
        engines = [make_engine(f"engine-{index}", publisher) for index in range(2)]
        with running(*engines):
            wait_for_engines([publisher], 2)
            assert {engine.transport for engine in publish_all([publisher], 1).engines} == {"collective"}
            change(tensors, 2)
            report = publish_all([publisher], 2)
            assert {engine.transport for engine in report.engines} == {"zmq"}
            assert report.num_bytes < publisher.num_bytes / 20
    assert_same_bits(engines[0].tensors, tensors)


def test_auto_takes_broadcasts_from_two_engines_on_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "weightcast.sync")
    tensors = make_large(9)
    with WeightPublisher(TensorSource(tensors), TCP, **BY_BROADCAST) as publisher:
        engines = [make_engine(f"engine-{index}", publisher, transport="auto") for index in range(2)]
        with running(engines[0]):
            publisher.wait_for_subscribers(1)
            for number in (1, 2, 3):
                assert [e.transport for e in publish_all([publisher], number).engines] == ["zmq"]
            assert generation_of(publisher) == 0
            assert "from source rank 0 by zmq: another host; not tried yet" in caplog.text
            with running(engines[1]):
                publisher.wait_for_subscribers(2)
                server = publisher._loop.server.broadcasts
                wait_until(lambda: server is not None and len(server.engines) == 2)
                publish_all([publisher], 4)  # both are told that there are two, and say that they are willing
                wait_for_engines([publisher], 2)
                change(tensors, 5)
                report = publish_all([publisher], 5)
                assert {engine.transport for engine in report.engines} == {"collective"}
                assert "by collective: another host, 2 engines; not tried yet" in caplog.text
                assert_same_bits(engines[1].tensors, tensors)


def test_where_a_host_shares_memory_nobody_joins() -> None:
    tensors = make_model(10)
    options = BY_BROADCAST | {"expose": ("shared_memory", "collective")}
    with WeightPublisher(TensorSource(tensors), TCP, **options) as publisher:
        engines = [make_engine(f"engine-{index}", publisher, transport="auto") for index in range(2)]
        with running(*engines):
            publisher.wait_for_subscribers(2)
            for number in (1, 2):
                report = publish_all([publisher], number)
                assert {engine.transport for engine in report.engines} == {"shared_memory"}
        server = publisher._loop.server.broadcasts
        assert server is not None and server.engines == ()


def test_who_insists_is_refused_where_broadcasts_cannot_be_had(ipc: str) -> None:
    tensors = make_model(11)
    with WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S, expose=()) as publisher:
        engine = make_engine("e", publisher)
        with running(engine):
            publisher.wait_for_subscribers(1)
            with pytest.raises(
                EngineError, match="transport='collective' cannot be had: the source does not expose it"
            ):
                publisher.publish(1)
        for name, value in {"want": {}, "into": tensors, "share": "group"}.items():
            options: dict[str, Any] = {name: value}
            with pytest.raises(ConfigError, match=f"{name} does not go together with broadcasts"):
                WeightSubscriber(publisher.address, transport="collective", **options)
    with pytest.raises(ConfigError, match="broadcasts need an address such as tcp://"):
        WeightPublisher(TensorSource(tensors), ipc, expose=("collective",))
    with pytest.raises(ConfigError, match="over Gloo or over NCCL"):
        WeightPublisher(TensorSource(tensors), TCP, expose=("collective", "collective_nccl"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="use 'gloo'"):
            WeightPublisher(TensorSource(tensors), TCP, expose=("collective_nccl",))


def test_one_engine_that_insists_is_broadcast_to_and_nothing_is_left_when_both_ends_close() -> None:
    before = threading.active_count()
    tensors = make_model(12)
    with WeightPublisher(TensorSource(tensors), TCP, **BY_BROADCAST) as publisher:
        engine = make_engine("engine-0", publisher)
        with running(engine):
            wait_for_engines([publisher], 1)
            for number in (1, 2, 3):
                assert [e.transport for e in publish_all([publisher], number).engines] == ["collective"]
    assert_same_bits(engine.tensors, tensors)
    wait_until(lambda: threading.active_count() <= before)
