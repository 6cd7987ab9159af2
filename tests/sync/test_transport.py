"""What every chunk transport must do, written against the protocols of `weightcast.sync.transports.base`.

A new transport joins by an entry in `TRANSPORTS`. Some tests are of ZeroMQ's alone: there a receiver may read by
itself, and chunks come as they are ready. On a TCP link they come in the order in which they were asked for;
`test_tcp.py` has what is special there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import zmq
from tests.sync.packed import CHUNK_BYTES, Packed, head, make_packed
from tests.sync.parts import WAIT_S, make_model
from tests.sync.tcp_parts import LinkClient, PolledServer

from weightcast.sync import Version
from weightcast.sync.device_landing import RunLanding
from weightcast.sync.effects import Request
from weightcast.sync.landing import Landing
from weightcast.sync.limits import MAX_CREDIT_CHUNKS
from weightcast.sync.messages import ChunkHeader, ChunkRequest
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports import zmq_sockets
from weightcast.sync.transports.base import ChunkClient, ChunkServer
from weightcast.sync.transports.zmq_chunks import ZmqChunkClient, ZmqChunkServer
from weightcast.sync.transports.zmq_sockets import make_context

V1, V2 = Version(1, 1), Version(1, 2)
Context = zmq.Context[zmq.Socket[bytes]]
Make = Callable[[Context, Path], tuple[ChunkServer, ChunkClient]]
TRANSPORTS: dict[str, Make] = {
    "zmq over tcp": lambda context, folder: (
        ZmqChunkServer(context, "tcp://127.0.0.1:0", None),
        ZmqChunkClient(context, None),
    ),
    "zmq over three links": lambda context, folder: (
        ZmqChunkServer(context, "tcp://127.0.0.1:0", None),
        ZmqChunkClient(context, None, num_links=3),
    ),
    "zmq over ipc": lambda context, folder: (
        ZmqChunkServer(context, f"ipc://{folder}/s", None),
        ZmqChunkClient(context, None),
    ),
    "tcp links": lambda context, folder: (PolledServer(), LinkClient()),
}
OF_ZMQ = sorted(name for name in TRANSPORTS if name.startswith("zmq"))


@dataclass
class Link:
    """A server with a snapshot of a source, and a client."""

    server: ChunkServer
    client: ChunkClient
    packed: Packed
    snapshot: Snapshot
    hashes_whole: bool = True
    """Whether whole chunks have a hash of their own."""

    def ask(
        self, version: Version, index: int, base: Version | None = None, *, reached: bool = False, count: int = 1
    ) -> None:
        """Ask for a chunk, or for several that are read."""
        message = ChunkRequest(version, index, base, reached, count)
        self.client.ask(Request(3, self.server.address, CHUNK_BYTES, message))

    def hear(self) -> tuple[ChunkHeader, bytes] | None:
        """The next chunk, or None after a while."""
        deadline_s = time.monotonic() + WAIT_S / 20
        while time.monotonic() < deadline_s:
            self.server.socket.poll(10)
            self.server.answer()
            for socket in self.client.sockets():
                socket.poll(10)
                if received := self.client.receive(socket):
                    assert received.rank == 3 and not isinstance(received.buffer, Landing | RunLanding)
                    return received.header, b"" if received.buffer is None else received.buffer.tobytes()
        return None

    def wanted(self, index: int, base: Version | None = None) -> tuple[ChunkHeader, bytes]:
        """What should be heard."""
        body = self.snapshot.body(index, base)
        header = head(self.snapshot, index, body)
        if body.encoding == "dense" and not self.hashes_whole:
            header = replace(header, hash=b"")
        return header, b"" if body.data is None else bytes(body.data)


def absent(version: Version, index: int) -> tuple[ChunkHeader, bytes]:
    """What is heard of a chunk that is not held."""
    return ChunkHeader(version, index, "absent", None, b""), b""


@contextmanager
def open_link(name: str, folder: Path) -> Iterator[Link]:
    """A link of one transport."""
    context, _ = make_context(None)
    server, client = TRANSPORTS[name](context, folder)
    packed = make_packed(make_model(51, rows=900))
    snapshot = packed.pack(1)
    server.hold(snapshot)
    yield Link(server, client, packed, snapshot, name in OF_ZMQ)
    client.close()
    server.close()
    context.destroy(linger=0)
    assert not list(folder.iterdir())


@pytest.fixture(params=sorted(TRANSPORTS))
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    """A link of each transport."""
    with open_link(request.param, tmp_path) as made:
        yield made


@pytest.fixture(params=OF_ZMQ)
def zmq_link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    """A link of each of ZeroMQ's."""
    with open_link(request.param, tmp_path) as made:
        yield made


def test_every_chunk_comes_as_it_was_packed(link: Link) -> None:
    for index in range(len(link.snapshot)):
        link.ask(V1, index)
        assert link.hear() == link.wanted(index)


def test_chunks_may_be_asked_for_ahead_and_twice(link: Link) -> None:
    wanted = [0, 1, 2, 2, 1]
    for index in wanted:
        link.ask(V1, index)
    heard = [link.hear() for _ in wanted]
    assert sorted(heard, key=str) == sorted((link.wanted(index) for index in wanted), key=str)
    assert link.hear() is None


@pytest.mark.parametrize(("version", "index"), [(V2, 0), (Version(0, 1), 0), (V1, 10_000)])
def test_what_is_not_held_is_said(link: Link, version: Version, index: int) -> None:
    link.ask(version, index)
    assert link.hear() == absent(version, index)


def test_another_snapshot_replaces_the_one_before(link: Link) -> None:
    link.server.drop()
    link.ask(V1, 0)
    assert link.hear() == absent(V1, 0)
    link.packed.tensors["embed.weight"].view(torch.int16)[0, 0] += 1
    link.snapshot = link.packed.pack(2)
    link.server.hold(link.snapshot)
    link.ask(V2, 0)
    assert link.hear() == link.wanted(0)
    link.ask(V1, 0)
    assert link.hear() == absent(V1, 0)
    for index, encoding in ((0, "delta"), (1, "same")):
        link.ask(V2, index, base=V1)
        heard = link.hear()
        assert heard == link.wanted(index, V1) and heard[0].encoding == encoding


def test_a_chunk_that_is_not_packed_yet_comes_when_it_is(zmq_link: Link) -> None:
    zmq_link.snapshot = zmq_link.packed.packer.begin(V2, "off")
    zmq_link.server.hold(zmq_link.snapshot)
    zmq_link.ask(V2, 1)
    zmq_link.ask(V2, 0)
    assert zmq_link.hear() is None
    zmq_link.packed.packer.pack_next(zmq_link.snapshot)
    assert zmq_link.hear() == zmq_link.wanted(0)
    assert zmq_link.hear() is None
    zmq_link.packed.packer.pack_next(zmq_link.snapshot)
    assert zmq_link.hear() == zmq_link.wanted(1)


def test_requests_that_wait_are_bounded_and_dropped_with_their_version(zmq_link: Link) -> None:
    zmq_link.snapshot = zmq_link.packed.packer.begin(V2, "off")
    zmq_link.server.hold(zmq_link.snapshot)
    for _ in range(4 * MAX_CREDIT_CHUNKS):
        zmq_link.ask(V2, 3)
    assert zmq_link.hear() is None
    zmq_link.server.drop()
    heard = 0
    while (answer := zmq_link.hear()) is not None:
        assert answer == absent(V2, 3)
        heard += 1
    assert 0 < heard <= 3 * MAX_CREDIT_CHUNKS


def test_what_a_receiver_reads_by_itself_is_not_sent(zmq_link: Link) -> None:
    zmq_link.ask(V1, 2, reached=True)
    assert zmq_link.hear() == (ChunkHeader(V1, 2, "dense", None, b""), b"")


def test_chunks_that_are_read_are_asked_for_at_once_and_told_when_the_last_is_packed(zmq_link: Link) -> None:
    zmq_link.snapshot = zmq_link.packed.packer.begin(V2, "off")
    zmq_link.server.hold(zmq_link.snapshot)
    zmq_link.ask(V2, 0, reached=True, count=3)
    assert zmq_link.hear() is None and zmq_link.server.awaited_index == 2
    for _ in range(2):
        zmq_link.packed.packer.pack_next(zmq_link.snapshot)
    assert zmq_link.hear() is None
    zmq_link.packed.packer.pack_next(zmq_link.snapshot)
    assert zmq_link.hear() == (ChunkHeader(V2, 0, "dense", None, b"", 3), b"")
    assert zmq_link.server.awaited_index is None and not zmq_link.server.has_sent


def test_runs_are_told_apart_where_only_some_chunks_changed_or_are_none(zmq_link: Link) -> None:
    zmq_link.packed.tensors["embed.weight"].view(torch.int16)[0, 0] += 1
    zmq_link.snapshot = zmq_link.packed.pack(2)
    zmq_link.server.hold(zmq_link.snapshot)
    num_chunks = len(zmq_link.snapshot)
    assert 3 < num_chunks < 60
    zmq_link.ask(V2, 0, V1, reached=True, count=num_chunks + 2)
    assert [zmq_link.hear() for _ in range(3)] == [
        (ChunkHeader(V2, 0, "dense", None, b""), b""),
        (ChunkHeader(V2, 1, "same", V1, b"", num_chunks - 1), b""),
        (ChunkHeader(V2, num_chunks, "absent", None, b"", 2), b""),
    ]
    assert zmq_link.hear() is None


def test_bytes_of_several_chunks_at_once_are_neither_sent_nor_taken(zmq_link: Link) -> None:
    zmq_link.ask(V1, 0, count=2)
    assert zmq_link.hear() is None
    zmq_link.ask(V1, 0)
    assert zmq_link.hear() == zmq_link.wanted(0)


def test_memory_may_be_written_once_nothing_is_under_way(link: Link) -> None:
    # Large enough that ZeroMQ does not copy it.
    packed = make_packed({"w": torch.full((1 << 20,), 7, dtype=torch.uint8)}, chunk_bytes=1 << 20)
    link.server.hold(packed.pack(1))
    link.client.ask(Request(3, link.server.address, 1 << 20, ChunkRequest(V1, 0, None, False)))
    heard = link.hear()
    assert heard is not None and heard[1] == packed.tensors["w"].numpy().tobytes()
    link.server.drop()
    deadline_s = time.monotonic() + WAIT_S
    while link.server.is_sending:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_thread_that_has_closed_its_end_is_not_waited_for_to_wake_it() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        mine, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        theirs.bind("inproc://wake")
        mine.connect("inproc://wake")
        zmq_sockets.wake(mine)
        assert theirs.poll(1000)
        theirs.close(0)
        mine.sndtimeo = 2000  # of a plain send
        start_s = time.monotonic()
        zmq_sockets.wake(mine)
        assert time.monotonic() - start_s < 1.0
    finally:
        context.destroy(linger=0)
