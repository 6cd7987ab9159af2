"""Damaged and hostile wires: what was altered is repaired or refused, and never served."""

import random
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from tests.sync.middle import Alter, Middle, pass_on
from tests.sync.parts import LIMITS, WAIT_S, Engine, TensorSource, assert_same_bits, make_model, running

from weightcast.sync import WeightPublisher, WeightSubscriber
from weightcast.sync.errors import DeadlineExceeded, EngineError, WireError
from weightcast.sync.messages import (
    PROTOCOL,
    Announce,
    ChunkHeader,
    Goodbye,
    Layout,
    Pong,
    Sealed,
    Welcome,
    decode,
    encode,
)
from weightcast.sync.records import Offer
from weightcast.sync.regions import Region
from weightcast.sync.version import Version

CHUNK_BYTES = 4096
TCP = "tcp://127.0.0.1:0"
Change = Callable[[bytes, bytes], list[list[bytes]]]


def flip(header: bytes, body: bytes) -> list[list[bytes]]:
    """One bit of the body."""
    return [[header, body[:7] + bytes([body[7] ^ 16]) + body[8:]]]


def read(header: bytes) -> ChunkHeader:
    """A chunk's header."""
    message = decode(header)
    assert isinstance(message, ChunkHeader)
    return message


def unknown(header: bytes, index: int) -> ChunkHeader:
    """A header of another chunk."""
    return replace(read(header), index=index)


CHANGES: dict[str, Change] = {
    "a flipped bit": flip,
    "a cut body": lambda header, body: [[header, body[:-1]]],
    "no body": lambda header, body: [[header]],
    "an empty body": lambda header, body: [[header, b""]],
    "a longer body": lambda header, body: [[header, body + b"\0"]],
    "a body past the limit": lambda header, body: [[header, body * 50]],
    "an extra frame": lambda header, body: [[header, body, b"more"], [header, body]],
    "twice": lambda header, body: [[header, body], [header, body]],
    "a duplicate that differs": lambda header, body: [[header, body], *flip(header, body)],
    "another message": lambda header, body: [[encode(Goodbye("no", False)), body], [header, body]],
    "no message": lambda header, body: [[b"\xc1", body], [header, body]],
    "an unknown chunk": lambda header, body: [[encode(unknown(header, 9999)), body], [header, body]],
    "an older version": lambda header, body: [
        [encode(ChunkHeader(Version(1, 0), 0, "absent", None, b""))],
        [header, body],
    ],
    "another encoding": lambda header, body: [[encode(replace(read(header), encoding="delta")), body]],
    "another hash": lambda header, body: [[encode(replace(read(header), hash=bytes(16))), body]],
    "nothing changed": lambda header, body: [[encode(replace(read(header), encoding="same"))]],
    "a base that it has not": lambda header, body: [
        [encode(replace(read(header), encoding="same", base=Version(1, 0)))]
    ],
    "nothing": lambda header, body: [],
}


def once_each(change: Change) -> Alter:
    """Alter each chunk the first time that it passes."""
    seen: set[int] = set()

    def alter(index: int, header: bytes, body: bytes) -> list[list[bytes]]:
        if index in seen:
            return pass_on(index, header, body)
        seen.add(index)
        return change(header, body)

    return alter


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_chunk_altered_once_is_repaired(name: str) -> None:
    tensors = make_model(21)
    with (
        WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S, epoch=1) as publisher,
        Middle(publisher.address, once_each(CHANGES[name])) as middle,
    ):
        engine = Engine("engine-0", middle.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            report = publisher.publish(1)
    assert report.serving == ("engine-0",) and engine.numbers == [1] and engine.errors == []
    assert_same_bits(engine.tensors, tensors)


def test_chunks_out_of_order_are_assembled() -> None:
    tensors = make_model(22, rows=400)
    late: list[list[bytes]] = []

    def reorder(index: int, header: bytes, body: bytes) -> list[list[bytes]]:
        late.append([header, body])
        if len(late) < 3:
            return []
        random.Random(index).shuffle(late)
        released, late[:] = list(late), []
        return released

    with (
        WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as publisher,
        Middle(publisher.address, reorder) as middle,
    ):
        engine = Engine("engine-0", middle.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            assert publisher.publish(1).serving == ("engine-0",)
    assert_same_bits(engine.tensors, tensors)


@pytest.mark.parametrize("name", ["a flipped bit", "a cut body", "no body", "a longer body"])
def test_a_chunk_altered_every_time_refuses_the_version_by_name(name: str) -> None:
    tensors = make_model(23)
    with ExitStack() as stack:
        source = TensorSource(tensors)
        publisher = stack.enter_context(WeightPublisher(source, TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S))
        publisher.publish(1)
        middle = stack.enter_context(Middle(publisher.address))
        subscriber = stack.enter_context(WeightSubscriber(middle.address, engine="e", limits=LIMITS))
        subscriber.wait(WAIT_S).commit()
        while publisher.fleet()[0].serving is None:
            time.sleep(0.01)
        middle.alter = lambda index, header, body: CHANGES[name](header, body)
        with pytest.raises(EngineError, match=r"e is refused \(chunk \d+ of version 2 .*source rank 0 \("):
            publisher.publish(2)
        with pytest.raises(WireError, match=r"chunk \d+ of version 2 .* \((embed|layer)"):
            subscriber.wait(WAIT_S)
        assert subscriber.serving is not None and subscriber.serving.number == 1
        middle.alter = pass_on
        engine = Engine("second", middle.address)
        with running(engine), pytest.raises(DeadlineExceeded, match="e is staged"):
            publisher.publish(3, timeout_s=1.0)
        update = subscriber.wait(WAIT_S)
        assert update.version.number == 3
        assert_same_bits(dict(update), tensors)


def test_chunks_that_never_come_leave_the_engine_as_it_is() -> None:
    with (
        WeightPublisher(TensorSource(make_model(24)), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as publisher,
        Middle(publisher.address, lambda index, header, body: [[header, body]] if index < 2 else []) as middle,
        WeightSubscriber(middle.address, engine="e", limits=LIMITS) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(DeadlineExceeded, match="e is staging"):
            publisher.publish(1, timeout_s=0.7)
        with pytest.raises(DeadlineExceeded, match=r"version 1 .* lacks \d+ chunks, asked of the source ranks \[0\]"):
            subscriber.wait(0.1)
        assert subscriber.serving is None and subscriber.released is None


def connect_raw(address: str) -> socket.socket:
    """A plain TCP connection to a ZeroMQ port."""
    host, port = address.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)))


def test_garbage_on_every_port_is_ignored() -> None:
    noise = random.Random(1)
    # A ZMTP 1.0 greeting needs no handshake: what follows is delivered as messages.
    zmtp_1 = b"\x01\x00" + b"".join(bytes([len(body) + 1, 0]) + body for body in (b"hello", b"\x81\xa4kind\x01"))
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    huge = b"\x01\x00" + b"\xff" + (1 << 62).to_bytes(8, "big") + bytes(100)
    with WeightPublisher(TensorSource(make_model(25)), TCP, timeout_s=WAIT_S) as publisher:
        data_address = publisher._loop.server.address
        sockets = []
        for address in (publisher.address, data_address):
            for raw in (noise.randbytes(4096), zmtp_1, greeting + noise.randbytes(500), huge, b""):
                sockets.append(connect_raw(address))
                sockets[-1].sendall(raw)
        engine = Engine("engine-0", publisher.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            for number in (1, 2):
                assert publisher.publish(number).serving == ("engine-0",)
        for raw_socket in sockets:
            raw_socket.close()
    assert engine.errors == []


HOSTILE = [
    b"",
    b"\xc1",
    b"\x83\xa4kind\xa4Pong\xa5epoch" + b"\x91" * 1010 + b"\xc0\xa5known\xc3",
    b"\x83\xa4kind\xa4Ping\xa1a\x01\xc4\x01b\x02",
    encode(Pong(3, False)),
    encode(Announce(Version(1, 1), ())),
    encode(Layout(1, 16, ())),
    encode(Sealed(Version(1, 1), b"")),
]


def test_hostile_messages_end_no_publisher() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with WeightPublisher(TensorSource(make_model(26)), TCP, timeout_s=WAIT_S) as publisher:
        strangers = [context.socket(zmq.DEALER) for _ in range(2)]
        for stranger, address in zip(strangers, (publisher.address, publisher._loop.server.address), strict=True):
            stranger.connect(address)
            for raw in HOSTILE:
                stranger.send(raw)
                stranger.send_multipart([raw, raw])
        engine = Engine("engine-0", publisher.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            assert publisher.publish(1).serving == ("engine-0",)
        context.destroy(linger=0)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:1", "nonsense", "ipc://relative", "tcp://no-such-host.invalid:1"])
def test_a_source_at_an_impossible_address_is_refused(address: str, tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rogue = context.socket(zmq.ROUTER)
    port = rogue.bind_to_random_port("tcp://127.0.0.1")
    specs = TensorSource(make_model(27)).specs()[-1:]
    offer = Offer(0, address, (Region(specs[0].name, (0,), specs[0].shape),))
    with WeightSubscriber(f"tcp://127.0.0.1:{port}", engine="e", limits=LIMITS) as subscriber:
        peer, _ = rogue.recv_multipart()
        for message in (
            *(Welcome(PROTOCOL, 5, tuple(specs)), Layout(5, 4096, (offer,)), Announce(Version(5, 1), ())),
            *(Pong(5, True), Announce(Version(5, 2), ()), Sealed(Version(5, 2), b"")),
        ):
            rogue.send_multipart([peer, encode(message)])
        for raw in HOSTILE:
            rogue.send_multipart([peer, raw])
        with pytest.raises((WireError, DeadlineExceeded), match=r"source rank 0|digests"):
            subscriber.wait(2)
        rogue.send_multipart([peer, encode(Welcome(PROTOCOL, 6, ()))])
        deadline_s = time.monotonic() + WAIT_S
        while subscriber.specs(1) != ():
            assert time.monotonic() < deadline_s
    context.destroy(linger=0)
