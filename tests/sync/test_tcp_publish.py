"""Versions over TCP links, from publishers to engines: what they carry, and what becomes of them when they break."""

import socket
import threading
import time
from typing import Any

import pytest
import torch
import zmq
from tests.sync.middle import Middle
from tests.sync.parts import (
    PATIENT,
    WAIT_S,
    Engine,
    TensorSource,
    assert_same_bits,
    make_model,
    on_all,
    publishers,
    random_bits,
    running,
)
from tests.sync.tcp_parts import Alter, linked, wait_for

from weightcast.sync import CurveKeys, PublishReport, Version, WeightPublisher
from weightcast.sync.effects import Request
from weightcast.sync.errors import ConfigError, EngineError
from weightcast.sync.messages import ChunkRequest
from weightcast.sync.transports.servers import choose_kinds

TCP = "tcp://127.0.0.1:0"
SERVER, ENGINE = (zmq.curve_keypair() for _ in range(2))
KEYS = CurveKeys(*SERVER, server=SERVER[0], allowed=(ENGINE[0], SERVER[0]))
ENGINE_KEYS = CurveKeys(*ENGINE, server=SERVER[0])


def make_large(seed: int) -> dict[str, torch.Tensor]:
    """Enough for landings of several steps, in chunks of 1 MiB."""
    return make_model(seed) | {"large": random_bits(torch.bfloat16, (1500, 1200), seed)}


@pytest.mark.parametrize(
    ("expose", "address", "keys", "kinds"),
    [
        (None, TCP, None, ("shared_memory", "tcp")),
        (None, "ipc:///tmp/x", None, ("shared_memory",)),
        (None, TCP, KEYS, ("shared_memory",)),
        (("tcp",), TCP, KEYS, ("tcp",)),
        ((), TCP, None, ()),
    ],
)
def test_links_are_served_where_nothing_is_encrypted_or_as_asked_for(
    expose: tuple[str, ...] | None, address: str, keys: CurveKeys | None, kinds: tuple[str, ...]
) -> None:
    assert choose_kinds(expose, address, keys) == kinds


def test_links_need_an_address_of_tcp(ipc: str) -> None:
    with pytest.raises(ConfigError, match="TCP links need an address such as tcp://"):
        WeightPublisher(TensorSource(make_model(1)), ipc, expose=("tcp",))


def publish(publisher: WeightPublisher, number: int, engines: list[Engine], tensors: dict[str, Any]) -> PublishReport:
    """A version that every engine has, with all bits."""
    report = publisher.publish(number)
    for engine in engines:
        assert number in engine.numbers and engine.errors == []
        assert_same_bits(engine.tensors, tensors)
    return report


def test_whole_versions_and_deltas_to_many_engines_some_of_them_late() -> None:
    tensors = make_large(3)
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=1 << 20, timeout_s=WAIT_S, delta="on") as publisher:
        names = [f"engine-{number}" for number in range(3)]
        engines = [Engine(name, publisher.address, kwargs={"transport": "tcp"}, limits=PATIENT) for name in names]
        with running(*engines[:2]):
            publisher.wait_for_subscribers(2)
            whole = publish(publisher, 1, engines[:2], tensors)
            with running(engines[2]):
                publisher.wait_for_subscribers(3)
                tensors["large"].view(torch.int16)[7, :9] += 1
                changed = publish(publisher, 2, engines, tensors)
    assert {engine.transport for engine in (*whole.engines, *changed.engines)} == {"tcp"}
    bytes_of = {engine.engine: engine.num_bytes for engine in changed.engines}
    # The late one may have had version 1 in time, or some chunks of it.
    assert bytes_of["engine-0"] == bytes_of["engine-1"] < 200
    assert bytes_of["engine-0"] <= bytes_of["engine-2"] <= publisher.num_bytes + bytes_of["engine-0"]
    assert not any(engine.num_repeats for engine in changed.engines)


def test_two_sources_one_group_each() -> None:
    tensors = make_large(4)
    with publishers(tensors, 2, TCP, timeout_s=WAIT_S, chunk_bytes=1 << 20, expose=("tcp",)) as made:
        engine = Engine("engine-0", made[0].address)
        with running(engine):
            made[0].wait_for_subscribers(1)
            for number in (1, 2, 3):
                tensors["large"].view(torch.int16)[:, number] += 1
                reports = on_all(made, lambda publisher, number=number: publisher.publish(number))  # type: ignore[misc]
                assert all(isinstance(report, PublishReport) for report in reports), reports
    assert engine.numbers == [1, 2, 3]
    assert_same_bits(engine.tensors, tensors)


def test_where_a_host_shares_memory_no_link_is_made() -> None:
    tensors = make_model(5)
    with WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S) as publisher:
        engine = Engine("engine-0", publisher.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            report = publish(publisher, 1, [engine], tensors)
        assert report.engines[0].transport == "shared_memory"
        assert publisher._loop.server._tcp is not None and publisher._loop.server._tcp._links == {}


@pytest.mark.parametrize("expose", [None, ("tcp",)])
def test_with_keys_links_are_for_those_who_ask_by_name(expose: tuple[str, ...] | None) -> None:
    tensors = make_model(6)
    source = TensorSource(tensors)
    with WeightPublisher(source, TCP, keys=KEYS, expose=expose, timeout_s=WAIT_S) as publisher:
        engine = Engine("e", publisher.address, kwargs={"keys": ENGINE_KEYS, "transport": "tcp"})
        with running(engine):
            publisher.wait_for_subscribers(1)
            if expose is None:
                with pytest.raises(EngineError, match="transport='tcp' cannot be had: the source does not expose it"):
                    publisher.publish(1)
            else:
                assert publish(publisher, 1, [engine], tensors).engines[0].transport == "tcp"


def flip(at: int) -> Alter:
    """One bit, once."""
    seen: list[int] = []

    def alter(before: int, raw: bytes) -> bytes:
        if not seen and before <= at < before + len(raw):
            seen.append(at)
            return raw[: at - before] + bytes([raw[at - before] ^ 4]) + raw[at - before + 1 :]
        return raw

    return alter


def stop(at: int) -> Alter:
    """Nothing more comes."""
    return lambda before, raw: raw if before < at else b""


def end(at: int) -> Alter:
    """The link is cut."""
    return lambda before, raw: raw if before < at else None


@pytest.mark.parametrize(
    "alter",
    [flip(200_000), flip(5), flip(40), end(1), end(300_000), end(1_500_000), stop(1), stop(300_000)],
    ids=["a body", "a length", "a header", "cut at once", "cut in a body", "cut later", "silent at once", "silent"],
)
def test_what_is_damaged_or_does_not_come_is_asked_for_again(alter: Alter) -> None:
    tensors = make_large(7)
    source = TensorSource(tensors)
    with (
        WeightPublisher(source, TCP, chunk_bytes=1 << 20, timeout_s=WAIT_S, expose=("tcp",)) as publisher,
        Middle(publisher.address, alter_stream=alter) as middle,
    ):
        engine = Engine("engine-0", middle.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            report = publish(publisher, 1, [engine], tensors)
            assert report.engines[0].num_repeats > 0 or report.engines[0].transport == "zmq"
            tensors["large"].view(torch.int16)[3, :] += 1
            publish(publisher, 2, [engine], tensors)


def test_an_engine_that_stands_still_amid_a_version_costs_its_bits_nothing() -> None:
    """Its source goes on in other memory, so that what is sent to it stays one version's."""
    tensors = {"w": torch.full((48 << 20,), 1, dtype=torch.uint8)}
    source = TensorSource(tensors)
    with WeightPublisher(source, TCP, chunk_bytes=16 << 20, expose=("tcp",), timeout_s=WAIT_S) as publisher:
        publisher.publish(1)
        server = publisher._loop.server._tcp
        assert server is not None
        assert publisher._loop.assigned is not None
        version = Version(publisher._loop.assigned.epoch, 1)
        with linked(server) as slow:
            slow.ask(Request(0, "", 16 << 20, ChunkRequest(version, 0, None, True, 3)))
            deadline_s = time.monotonic() + WAIT_S
            while not server.is_sending:
                assert time.monotonic() < deadline_s
            tensors["w"][:] = 2
            publisher.publish(2)
            first = wait_for(slow)
            assert first.header.version == version and bool((torch.as_tensor(first.buffer) == 1).all())


def test_strangers_at_the_port_of_links_disturb_nobody() -> None:
    tensors = make_model(8)
    with WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S, expose=("tcp",)) as publisher:
        server = publisher._loop.server._tcp
        assert server is not None
        strangers = [socket.create_connection(server._listener.getsockname()) for _ in range(5)]
        for number, stranger in enumerate(strangers):
            stranger.sendall(bytes([number]) * 40 * number)
        engine = Engine("engine-0", publisher.address, kwargs={"transport": "tcp"})
        with running(engine):
            publisher.wait_for_subscribers(1)
            for number in (1, 2):
                publish(publisher, number, [engine], tensors)
        for stranger in strangers:
            stranger.close()


def test_nothing_is_left_when_both_ends_close() -> None:
    before = threading.active_count()
    with WeightPublisher(TensorSource(make_model(9)), TCP, timeout_s=WAIT_S, expose=("tcp",)) as publisher:
        engine = Engine("engine-0", publisher.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            publisher.publish(1)
    deadline_s = time.monotonic() + WAIT_S
    while threading.active_count() > before:
        assert time.monotonic() < deadline_s, threading.enumerate()
        time.sleep(0.01)
