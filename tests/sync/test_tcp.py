"""TCP links, both ends by themselves: who is admitted, what is sent in which order, peers that lie or fall silent."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.packed import CHUNK_BYTES, Packed, make_packed
from tests.sync.parts import WAIT_S, make_model
from tests.sync.tcp_parts import body_of, linked, wait_for

from weightcast.sync import Version
from weightcast.sync.effects import Request
from weightcast.sync.errors import AddressError, ReachError, WireError
from weightcast.sync.messages import ChunkHeader, ChunkRequest, Ping, encode
from weightcast.sync.transports import tcp_wire
from weightcast.sync.transports.tcp import TcpLink, reach
from weightcast.sync.transports.tcp_server import TcpChunkServer

V1, V2 = Version(1, 1), Version(1, 2)
GOOD = {"kind": "tcp", "host": "127.0.0.1", "port": 15000, "token": bytes(32)}


@pytest.fixture
def packed() -> Packed:
    """A source of more than a dozen chunks."""
    return make_packed(make_model(51, rows=900))


@pytest.fixture
def server() -> Iterator[TcpChunkServer]:
    """A server that holds nothing yet."""
    made = TcpChunkServer("127.0.0.1", max_links=6, max_strangers=3, first_word_s=0.5, stall_s=0.5)
    yield made
    made.close()


def ask(link: TcpLink, version: Version, index: int, count: int = 1, base: Version | None = None) -> None:
    """Ask for a run of chunks."""
    link.ask(Request(3, "", CHUNK_BYTES, ChunkRequest(version, index, base, True, count)))


def until(reached: Callable[[], bool]) -> None:
    """Wait for something that other threads bring about."""
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "example.org"}, "an IP address was expected, got 'example.org'"),
        ({"host": 7}, "an IP address was expected, got 7"),
        ({"port": 0}, "for port 0"),
        ({"port": 65536}, "an integer from 0 to 65535"),
        ({"token": bytes(31)}, "a token of 31 bytes"),
        ({"token": bytes(33)}, "at most 32 bytes were expected"),
        ({"token": "x" * 32}, "at most 32 bytes were expected"),
        ({"kind": "mooncake"}, "unknown kind of message 'mooncake'"),
        ({"more": 1}, "exactly ['host', 'port', 'token'] are allowed"),
        ({"more": "x" * 2000}, "exceeds the limit of 1024"),
    ],
)
def test_malformed_tickets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(WireError) as raised:
        reach(msgpack.packb(GOOD | changes), 1.0)
    assert message in str(raised.value)


@given(st.binary(max_size=200))
def test_no_bytes_are_a_ticket_by_chance(raw: bytes) -> None:
    with pytest.raises(WireError):
        tcp_wire.read_ticket(raw)


def test_tokens_differ_and_an_address_of_another_machine_cannot_be_served(server: TcpChunkServer) -> None:
    other = TcpChunkServer("127.0.0.1")
    tokens = {tcp_wire.read_ticket(ticket).token for ticket in (server.ticket, other.ticket)}
    other.close()
    assert len(tokens) == 2 and all(len(set(token)) > 8 for token in tokens)
    with pytest.raises(AddressError, match=r"cannot serve chunks over TCP at 192\.0\.2\.1"):
        TcpChunkServer("192.0.2.1")


def test_only_the_token_admits(server: TcpChunkServer) -> None:
    good = tcp_wire.read_ticket(server.ticket)
    for token in (bytes(32), good.token[:-1] + bytes([good.token[-1] ^ 1])):
        wrong = tcp_wire.pack_ticket(tcp_wire.TcpTicket(good.host, good.port, token))
        with pytest.raises(ReachError, match="did not admit this engine"):
            reach(wrong, 5.0)
    until(lambda: server.num_refused == 2)
    with linked(server):
        pass
    server.close()
    with pytest.raises(ReachError, match="no source answers over TCP"):
        reach(server.ticket, 5.0)


def connect(server: TcpChunkServer) -> socket.socket:
    """A stranger."""
    ticket = tcp_wire.read_ticket(server.ticket)
    return socket.create_connection((ticket.host, ticket.port), 5.0)


def is_closed(sock: socket.socket) -> bool:
    """Whether the server ended it, without a word."""
    with suppress(ConnectionError):
        return sock.recv(100) == b""
    return True


def test_strangers_say_something_soon_and_are_few(server: TcpChunkServer) -> None:
    silent = [connect(server) for _ in range(3)]
    until(lambda: len(server._links) == 3)
    with connect(server) as one_more:
        assert is_closed(one_more)
    silent[0].sendall(tcp_wire.MAGIC)  # and no token
    for sock in silent:
        assert is_closed(sock)
        sock.close()
    until(lambda: server.num_refused == 4)
    with linked(server):
        pass


def test_links_are_few(server: TcpChunkServer) -> None:
    links = [reach(server.ticket, 5.0) for _ in range(6)]
    with pytest.raises(ReachError, match="too many engines ask at once"):
        reach(server.ticket, 5.0)
    links[0].close()
    until(lambda: len(server._links) == 5)
    links[0] = reach(server.ticket, 5.0)
    for link in links:
        link.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\0\0\0",
        b"\xff\xff\xff\xff" + bytes(100),
        tcp_wire.REQUEST_PREFIX.pack(5) + b"\xc1\xc1\xc1\xc1\xc1",
        tcp_wire.REQUEST_PREFIX.pack(len(encode(Ping()))) + encode(Ping()),
        tcp_wire.REQUEST_PREFIX.pack(9) + b"\x80",  # and then nothing
    ],
    ids=["no length", "a great length", "no message", "another message", "broken off"],
)
def test_malformed_requests_end_a_link_and_no_other(server: TcpChunkServer, packed: Packed, raw: bytes) -> None:
    snapshot = packed.pack(1)
    server.hold(snapshot)
    with linked(server) as good, connect(server) as bad:
        bad.sendall(tcp_wire.MAGIC + tcp_wire.read_ticket(server.ticket).token)
        assert bad.recv(1) == tcp_wire.ADMITTED
        bad.sendall(raw)
        assert is_closed(bad)
        ask(good, V1, 0)
        assert body_of(wait_for(good)) == bytes(snapshot.states[0].bits)
    assert server.num_refused == 1


def test_runs_come_in_order_as_they_are_packed(server: TcpChunkServer, packed: Packed) -> None:
    snapshot = packed.packer.begin(V2, "off")
    server.hold(snapshot)
    with linked(server) as link:
        ask(link, V2, 0, count=3)
        ask(link, V2, 3, count=2)
        until(lambda: server.awaited_index == 0)
        for index in range(5):
            packed.packer.pack_next(snapshot)
            if server.awaited_index is not None:
                server.notify()
            received = wait_for(link)
            assert received.header == ChunkHeader(V2, index, "dense", None, b"")
            assert body_of(received) == bytes(snapshot.states[index].bits)
        until(lambda: server.awaited_index is None)


def test_a_source_that_packs_slowly_gives_a_sign(server: TcpChunkServer, packed: Packed) -> None:
    server.hold(packed.packer.begin(V2, "off"))
    with linked(server) as link:
        link._silence_s = 1.0
        ask(link, V2, 0)
        until_s = time.monotonic() + 2.0
        while time.monotonic() < until_s:
            assert link.receive(3, lambda *_: None) is None
            link.check(time.monotonic())
            time.sleep(0.02)


def test_deltas_and_runs_that_did_not_change(server: TcpChunkServer, packed: Packed) -> None:
    packed.pack(1)
    packed.tensors["embed.weight"].view(torch.int16)[0, 0] += 1
    snapshot = packed.pack(2)
    server.hold(snapshot)
    with linked(server) as link:
        ask(link, V2, 0, count=len(snapshot), base=V1)
        first = wait_for(link)
        body = snapshot.body(0, V1)
        assert body.data is not None and body_of(first) == bytes(body.data)
        assert first.header == ChunkHeader(V2, 0, "delta", V1, body.hash())
        for index in range(1, len(snapshot)):
            received = wait_for(link)
            assert received.header == ChunkHeader(V2, index, "same", V1, b"") and received.buffer is None


def test_many_engines_at_once_get_all(server: TcpChunkServer, packed: Packed) -> None:
    snapshot = packed.packer.begin(V1, "off")
    server.hold(snapshot)
    bodies: dict[int, list[bytes]] = {}

    def fetch(number: int) -> None:
        with linked(server) as link:
            ask(link, V1, 0, count=len(snapshot))
            bodies[number] = [body_of(wait_for(link)) for _ in range(len(snapshot))]

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for _ in range(len(snapshot)):
        packed.packer.pack_next(snapshot)
        server.notify()
    for thread in threads:
        thread.join(WAIT_S)
    wanted = [bytes(state.bits) for state in snapshot.states]
    assert [bodies.get(number) for number in range(5)] == [wanted] * 5


def test_a_slow_engine_holds_nobody_up_and_is_left_when_it_stands_still(server: TcpChunkServer) -> None:
    packed = make_packed({"w": torch.full((64 << 20,), 7, dtype=torch.uint8)}, chunk_bytes=16 << 20)
    server.hold(packed.pack(1))
    request = Request(3, "", 16 << 20, ChunkRequest(V1, 0, None, True, 4))
    with linked(server) as slow, linked(server) as quick:
        slow._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.ask(request)
        until(lambda: server.is_sending)
        quick.ask(request)
        for _ in range(4):
            assert np.all(np.frombuffer(body_of(wait_for(quick)), np.uint8) == 7)
        server.drop()
        until(lambda: server.num_refused == 1)
        assert not server.is_sending
        with pytest.raises(ReachError, match="is given up"):
            for _ in range(4):
                wait_for(slow)


def test_what_is_dropped_amid_a_run_is_said(server: TcpChunkServer, packed: Packed) -> None:
    snapshot = packed.packer.begin(V1, "off")
    server.hold(snapshot)
    with linked(server) as link:
        ask(link, V1, 0, count=3)
        packed.packer.pack_next(snapshot)
        server.notify()
        assert wait_for(link).header.encoding == "dense"
        server.drop()
        assert [wait_for(link).header.encoding for _ in range(2)] == ["absent", "absent"]


@contextmanager
def lying(*parts: bytes) -> Iterator[TcpLink]:
    """A link to a source that admits, and then says just this; b"" is the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def lie() -> None:
        with listener.accept()[0] as sock:
            sock.recv(100)
            sock.sendall(tcp_wire.ADMITTED + b"".join(parts))
            if b"" not in parts:
                done.wait(WAIT_S)

    thread = threading.Thread(target=lie)
    thread.start()
    link = reach(tcp_wire.pack_ticket(tcp_wire.TcpTicket("127.0.0.1", listener.getsockname()[1], bytes(32))), 5.0)
    ask(link, V1, 0)
    try:
        yield link
    finally:
        link.close()
        done.set()
        thread.join()
        listener.close()


def framed(raw: bytes, num_bytes: int) -> bytes:
    """A header as a liar sends it."""
    return tcp_wire.CHUNK_PREFIX.pack(len(raw), num_bytes) + raw


WHOLE = encode(ChunkHeader(V1, 0, "dense", None, b""))
# As the kernel has it, which resets a link whose closer had not read everything.
CLOSED = "the source closed it|reset by peer"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([tcp_wire.CHUNK_PREFIX.pack(5000, 0)], "it sent 5000 and 0 bytes, which no chunk of it has"),
        ([framed(WHOLE, CHUNK_BYTES + 1)], f"and {CHUNK_BYTES + 1} bytes, which no chunk"),
        ([framed(WHOLE, (1 << 32) - 1)], "and 4294967295 bytes, which no chunk"),
        ([tcp_wire.CHUNK_PREFIX.pack(0, 7)], "a body without a header"),
        ([framed(b"\xc1", 0)], "it sent no chunk: not a weightcast message"),
        ([framed(encode(Ping()), 0)], "a Ping instead of one chunk's header"),
        ([framed(encode(ChunkHeader(V1, 0, "same", V1, b"", 2)), 0)], "instead of one chunk's header"),
        ([b""], CLOSED),
        ([tcp_wire.BEAT, WHOLE[:3], b""], f"it sent|{CLOSED}"),
        ([framed(WHOLE, 100), bytes(50), b""], CLOSED),
    ],
)
def test_a_source_that_lies_or_breaks_off_is_given_up(parts: list[bytes], message: str) -> None:
    with lying(*parts) as link, pytest.raises(ReachError, match=message):
        wait_for(link)


def test_a_source_that_says_nothing_is_given_up(server: TcpChunkServer) -> None:
    with lying(framed(WHOLE, 100), bytes(50)) as link:
        link._silence_s = 0.2
        with pytest.raises(TimeoutError):
            wait_for(link, 0.5)
        with pytest.raises(ReachError, match=r"silent for 0\.2 s"):
            link.check(time.monotonic())


def test_an_engine_that_is_not_admitted_in_time_gives_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ticket = tcp_wire.TcpTicket("127.0.0.1", listener.getsockname()[1], bytes(32))
        started_s = time.monotonic()
        with pytest.raises(ReachError, match="did not admit this engine: timed out"):
            reach(tcp_wire.pack_ticket(ticket), 0.3)
        assert time.monotonic() - started_s < 5
