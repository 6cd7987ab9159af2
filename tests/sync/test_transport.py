"""What every chunk transport must do, written against the protocols of `weightcast.sync.transports.base`.

A new transport joins by an entry in `TRANSPORTS`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import zmq
from tests.sync.parts import WAIT_S, make_model
from tests.sync.test_staging import CHUNK_BYTES, V1, pack

from weightcast.sync import Version
from weightcast.sync.arrival import Request
from weightcast.sync.messages import ChunkHeader, ChunkRequest
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports.base import ChunkClient, ChunkServer
from weightcast.sync.transports.zmq_chunks import ZmqChunkClient, ZmqChunkServer
from weightcast.sync.transports.zmq_sockets import make_context

Context = zmq.Context[zmq.Socket[bytes]]
Make = Callable[[Context, Path], tuple[ChunkServer, ChunkClient]]
TRANSPORTS: dict[str, Make] = {
    "zmq over tcp": lambda context, folder: (
        ZmqChunkServer(context, "tcp://127.0.0.1:0", None),
        ZmqChunkClient(context, None),
    ),
    "zmq over ipc": lambda context, folder: (
        ZmqChunkServer(context, f"ipc://{folder}/s", None),
        ZmqChunkClient(context, None),
    ),
}


@dataclass
class Link:
    """A server with a snapshot, and a client."""

    server: ChunkServer
    client: ChunkClient
    snapshot: Snapshot

    def ask(self, version: Version, index: int) -> None:
        """Ask for a chunk."""
        self.client.ask(Request(3, self.server.address, CHUNK_BYTES, ChunkRequest(version, index)))

    def hear(self) -> tuple[ChunkHeader, bytes] | None:
        """The next chunk, or None after a while."""
        deadline_s = time.monotonic() + WAIT_S / 20
        while time.monotonic() < deadline_s:
            self.server.socket.poll(10)
            self.server.answer()
            for socket in self.client.sockets():
                socket.poll(10)
                if received := self.client.receive(socket):
                    assert received.rank == 3
                    return received.header, received.buffer.tobytes()
        return None


@pytest.fixture(params=sorted(TRANSPORTS))
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    """A link of each transport."""
    context, _ = make_context(None)
    server, client = TRANSPORTS[request.param](context, tmp_path)
    snapshot, _ = pack(make_model(51, rows=900))
    server.hold(snapshot)
    yield Link(server, client, snapshot)
    client.close()
    server.close()
    context.destroy(linger=0)
    assert not list(tmp_path.iterdir())


def test_every_chunk_comes_as_it_was_packed(link: Link) -> None:
    for index in range(len(link.snapshot.chunks)):
        link.ask(V1, index)
        assert link.hear() == (ChunkHeader(V1, index, True), bytes(link.snapshot.buffers[index]))


def test_chunks_may_be_asked_for_ahead_and_twice(link: Link) -> None:
    wanted = [0, 1, 2, 2, 1]
    for index in wanted:
        link.ask(V1, index)
    heard = [link.hear() for _ in wanted]
    assert heard == [(ChunkHeader(V1, index, True), bytes(link.snapshot.buffers[index])) for index in wanted]
    assert link.hear() is None


@pytest.mark.parametrize(("version", "index"), [(Version(1, 2), 0), (Version(0, 1), 0), (V1, 10_000)])
def test_what_is_not_held_is_said(link: Link, version: Version, index: int) -> None:
    link.ask(version, index)
    assert link.hear() == (ChunkHeader(version, index, False), b"")


def test_another_snapshot_replaces_the_one_before(link: Link) -> None:
    link.server.drop()
    link.ask(V1, 0)
    assert link.hear() == (ChunkHeader(V1, 0, False), b"")
    newer = replace(link.snapshot, version=Version(1, 2))
    link.server.hold(newer)
    link.ask(Version(1, 2), 0)
    link.ask(V1, 0)
    assert link.hear() == (ChunkHeader(Version(1, 2), 0, True), bytes(newer.buffers[0]))
    assert link.hear() == (ChunkHeader(V1, 0, False), b"")


def test_memory_may_be_written_once_nothing_is_under_way(link: Link) -> None:
    # Large enough that ZeroMQ does not copy it.
    arena = np.full(1 << 20, 7, np.uint8)
    chunk = replace(link.snapshot.chunks[0], num_bytes=len(arena))
    link.server.hold(Snapshot(V1, (chunk,), (arena.data.toreadonly(),), bytes(16), (0,)))
    link.client.ask(Request(3, link.server.address, len(arena), ChunkRequest(V1, 0)))
    heard = link.hear()
    assert heard is not None and heard[1] == arena.tobytes()
    link.server.drop()
    deadline_s = time.monotonic() + WAIT_S
    while link.server.is_sending:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
