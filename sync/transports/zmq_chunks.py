"""Chunks over ZeroMQ: zero-copy out of the snapshot, and one copy, to their places, on the other side.

Receiver-driven: nothing is sent that was not asked for, and an engine asks only for what it has room for, so a slow
engine costs the source no memory (frames point into the snapshot). A request for a chunk that is not packed yet waits
until it is. An engine that asks for more than `MAX_CREDIT_CHUNKS` chunks at once is not answered until what it asked
for has left.

One connection of TCP carries 30 Gb/s at best, so an engine has several to each source.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby

import numpy as np
import zmq

from weightcast.sync.effects import Request
from weightcast.sync.errors import WireError
from weightcast.sync.limits import MAX_CREDIT_CHUNKS
from weightcast.sync.messages import ChunkHeader, ChunkRequest, decode, encode
from weightcast.sync.snapshot import ABSENT, Snapshot
from weightcast.sync.transports import zmq_sockets
from weightcast.sync.transports.base import ReceivedChunk
from weightcast.sync.transports.zmq_sockets import CurveKeys

MAX_REQUEST_BYTES = 4096
_HEADER_ROOM_BYTES = 4096
# The largest block that glibc's malloc learns from; it then keeps up to twice as much that is free.
_LEARNT_BYTES = 31 << 20


class ZmqChunkServer:
    """A ROUTER that answers `ChunkRequest`s from one snapshot."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: CurveKeys | None) -> None:
        self.socket, self.address = zmq_sockets.bind(context, address, keys, MAX_REQUEST_BYTES)
        self.num_malformed = 0
        self.awaited_index: int | None = None
        """The first chunk that somebody waits for; read by the packer's thread."""
        self.has_sent = False
        """Whether bytes of chunks were sent since `hold`, and not only read by engines of this host."""
        self._snapshot: Snapshot | None = None
        self._under_way: dict[bytes, deque[zmq.MessageTracker]] = {}
        # Requests for chunks that are not packed yet, in the order in which they came; bounded a peer by its credit.
        self._waiting: dict[bytes, deque[ChunkRequest]] = {}

    @property
    def is_sending(self) -> bool:
        """Whether ZeroMQ still points into the snapshot's memory."""
        return any(not tracker.done for trackers in self._under_way.values() for tracker in trackers)

    def hold(self, snapshot: Snapshot) -> None:
        """Serve this snapshot from now on; requests for another are answered with 'absent'."""
        self._snapshot = snapshot
        self.has_sent = False
        self._under_way.clear()

    def drop(self) -> None:
        """Serve nothing; what is under way still leaves."""
        self._snapshot = None

    def answer(self) -> None:
        """Answer every request that is there, and earlier ones whose chunks became ready."""
        self._answer_new()
        while True:
            for peer in list(self._waiting):
                self._answer_waiting(peer)
            requests = [request for waiting in self._waiting.values() for request in waiting]
            self.awaited_index = min(map(self._last, requests), default=None)
            # The packer sees it from here on; what was packed before that is answered at once.
            if all(map(self._must_wait, requests)):
                return

    def _answer_new(self) -> None:
        while True:
            try:
                peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                request = decode(frames[0]) if len(frames) == 1 else None
            except WireError:
                request = None
            if not isinstance(request, ChunkRequest) or (request.count > 1 and not request.reached):
                self.num_malformed += 1
            elif self._must_wait(request):
                waiting = self._waiting.setdefault(peer, deque())
                if len(waiting) < MAX_CREDIT_CHUNKS:
                    waiting.append(request)
            else:
                self._send(peer, request)

    def _must_wait(self, request: ChunkRequest) -> bool:
        snapshot = self._snapshot
        if snapshot is None or request.version != snapshot.version:
            return False
        # Of a source that packs little what is not packed is ready before what comes ahead of it.
        return not all(map(snapshot.is_ready, range(request.index, self._last(request) + 1)))

    def _last(self, request: ChunkRequest) -> int:
        """The index of the last chunk that is asked for."""
        snapshot = self._snapshot
        end = request.index + request.count
        return (end if snapshot is None else min(end, max(len(snapshot), request.index + 1))) - 1

    def _answer_waiting(self, peer: bytes) -> None:
        waiting = self._waiting.pop(peer)
        still = deque(request for request in waiting if self._must_wait(request))
        if still:
            self._waiting[peer] = still
        for request in waiting:
            if not self._must_wait(request):
                self._send(peer, request)

    def _send_run(self, peer: bytes, request: ChunkRequest) -> None:
        """Tell an engine which chunks it may read; a header for each run of those that are alike."""
        snapshot = self._snapshot
        assert snapshot is not None
        indices = range(request.index, request.index + request.count)
        bodies = (snapshot.body(index, request.base, reached=True) for index in indices)
        index = request.index
        for body, alike in groupby(bodies):
            count = sum(1 for _ in alike)
            self.socket.send_multipart(
                [peer, encode(ChunkHeader(request.version, index, body.encoding, body.base, b"", count))]
            )
            index += count

    def _send(self, peer: bytes, request: ChunkRequest) -> None:
        snapshot = self._snapshot
        if request.count > 1 and snapshot is not None and request.version == snapshot.version:
            self._send_run(peer, request)
            return
        if snapshot is None or request.version != snapshot.version:
            body, body_hash = ABSENT, b""
        else:
            body = snapshot.body(request.index, request.base, reached=request.reached)
            body_hash = snapshot.hash(request.index, body) if request.hashed or body.encoding != "dense" else b""
        header = encode(ChunkHeader(request.version, request.index, body.encoding, body.base, body_hash))
        if body.data is None:
            self.socket.send_multipart([peer, header])
            return
        trackers = self._under_way.setdefault(peer, deque())
        while trackers and trackers[0].done:
            trackers.popleft()
        if len(trackers) >= MAX_CREDIT_CHUNKS:
            return
        self.socket.send_multipart([peer, header], zmq.SNDMORE)
        tracker = self.socket.send(body.data, copy=False, track=True)
        assert tracker is not None
        trackers.append(tracker)
        self.has_sent = True

    def close(self) -> None:
        """Stop serving."""
        self.socket.close(0)
        zmq_sockets.remove_ipc_file(self.address)


class ZmqChunkClient:
    """`num_links` DEALERs a source, which take its chunks in turn."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys | None, *, num_links: int = 1) -> None:
        self._context = context
        self._keys = keys
        self._num_links = num_links
        # libzmq takes memory for each message. Until a larger block came and went, malloc gives the last one's pages
        # back to the system each time, and every page of the next is faulted in: half of the receiver's time here.
        np.empty(_LEARNT_BYTES, np.uint8)
        self._links: dict[tuple[int, str, int], list[zmq.Socket[bytes]]] = {}
        self._ranks: dict[zmq.Socket[bytes], int] = {}
        self._limits: dict[zmq.Socket[bytes], int] = {}

    def ask(self, request: Request) -> None:
        """Send a request, over new links where the source is new."""
        raw = encode(request.message)
        links = self._links.get((request.rank, request.address, request.chunk_bytes))
        if links is None:
            links = self._open(request)
        number = request.message.index % len(links)
        try:
            links[number].send(raw, zmq.NOBLOCK)
        except zmq.Again:
            # After a frame beyond the limit libzmq ends a link for good, and a plain send would wait for ever.
            # The new one may end as soon; the request is then repeated like any that was lost on its way.
            link = self._open(request)[number]
            with suppress(zmq.Again):
                link.send(raw, zmq.NOBLOCK)

    def _open(self, request: Request) -> list[zmq.Socket[bytes]]:
        self._drop_rank(request.rank)
        limit = request.chunk_bytes + _HEADER_ROOM_BYTES
        links = [zmq_sockets.connect(self._context, request.address, self._keys, limit) for _ in range(self._num_links)]
        self._links[request.rank, request.address, request.chunk_bytes] = links
        self._ranks |= dict.fromkeys(links, request.rank)
        self._limits |= dict.fromkeys(links, request.chunk_bytes)
        return links

    def _drop_rank(self, rank: int) -> None:
        """A source that moved: its old links would only reconnect forever."""
        for key in [key for key in self._links if key[0] == rank]:
            for socket in self._links.pop(key):
                del self._ranks[socket], self._limits[socket]
                socket.close(0)

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The links."""
        return list(self._ranks)

    def receive(self, socket: zmq.Socket[bytes]) -> ReceivedChunk | None:
        """One chunk, or None when there is none."""
        try:
            raw = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        rank = self._ranks[socket]
        try:
            header = decode(raw)
        except WireError:
            for _ in _rest(socket):
                pass
            raise
        if not isinstance(header, ChunkHeader):
            for _ in _rest(socket):
                pass
            raise WireError(f"source rank {rank} sent a {type(header).__name__} instead of a chunk")
        if not socket.rcvmore:
            return ReceivedChunk(rank, header, None)
        if header.count > 1:
            for _ in _rest(socket):
                pass
            raise WireError(f"source rank {rank} sent bytes for {header.count} chunks at once")
        # As it lies in libzmq's memory: it is copied once, to its places, in the pass that digests it.
        body = np.frombuffer(socket.recv(copy=False).buffer, np.uint8)
        if sum(1 for _ in _rest(socket)) or len(body) > self._limits[socket]:
            raise WireError(f"source rank {rank} sent something else than a chunk of {self._limits[socket]} bytes")
        return ReceivedChunk(rank, header, body)

    def close(self) -> None:
        """Close every link."""
        for socket in self._ranks:
            socket.close(0)
        self._ranks.clear()
        self._limits.clear()
        self._links.clear()


def _rest(socket: zmq.Socket[bytes]) -> Iterator[bytes]:
    """The frames of a message that are left."""
    while socket.rcvmore:
        yield socket.recv()
