"""Chunks over ZeroMQ: zero-copy out of the snapshot, straight into one scratch buffer on the other side.

Receiver-driven: nothing is sent that was not asked for, and an engine asks only for what it has room for, so a slow
engine costs the source no memory (frames point into the snapshot). An engine that asks for more than
`MAX_CREDIT_CHUNKS` chunks at once is not answered until what it asked for has left.
"""

from collections import deque

import numpy as np
import numpy.typing as npt
import zmq

from weightcast.sync.arrival import MAX_CREDIT_CHUNKS, Request
from weightcast.sync.errors import WireError
from weightcast.sync.messages import ChunkHeader, ChunkRequest, decode, encode
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports import zmq_sockets
from weightcast.sync.transports.base import ReceivedChunk
from weightcast.sync.transports.zmq_sockets import CurveKeys

MAX_REQUEST_BYTES = 4096
_HEADER_ROOM_BYTES = 4096


class ZmqChunkServer:
    """A ROUTER that answers `ChunkRequest`s from one snapshot."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: CurveKeys | None) -> None:
        self.socket, self.address = zmq_sockets.bind(context, address, keys, MAX_REQUEST_BYTES)
        self.num_malformed = 0
        self._snapshot: Snapshot | None = None
        self._under_way: dict[bytes, deque[zmq.MessageTracker]] = {}

    @property
    def is_sending(self) -> bool:
        """Whether ZeroMQ still points into the snapshot's memory."""
        return any(not tracker.done for trackers in self._under_way.values() for tracker in trackers)

    def hold(self, snapshot: Snapshot) -> None:
        """Serve this snapshot from now on; requests for another are answered with 'not held'."""
        self._snapshot = snapshot
        self._under_way.clear()

    def drop(self) -> None:
        """Serve nothing; what is under way still leaves."""
        self._snapshot = None

    def answer(self) -> None:
        """Answer every request that is there."""
        while True:
            try:
                peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                request = decode(frames[0]) if len(frames) == 1 else None
            except WireError:
                request = None
            if isinstance(request, ChunkRequest):
                self._send(peer, request)
            else:
                self.num_malformed += 1

    def _send(self, peer: bytes, request: ChunkRequest) -> None:
        snapshot = self._snapshot
        if snapshot is None or request.version != snapshot.version or request.index >= len(snapshot.buffers):
            self.socket.send_multipart([peer, encode(ChunkHeader(request.version, request.index, False))])
            return
        trackers = self._under_way.setdefault(peer, deque())
        while trackers and trackers[0].done:
            trackers.popleft()
        if len(trackers) >= MAX_CREDIT_CHUNKS:
            return
        header = encode(ChunkHeader(request.version, request.index, True))
        self.socket.send_multipart([peer, header], zmq.SNDMORE)
        tracker = self.socket.send(snapshot.buffers[request.index], copy=False, track=True)
        assert tracker is not None
        trackers.append(tracker)

    def close(self) -> None:
        """Stop serving."""
        self.socket.close(0)
        zmq_sockets.remove_ipc_file(self.address)


class ZmqChunkClient:
    """One DEALER a source. Received bytes lie in a scratch buffer that stays in cache."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys | None) -> None:
        self._context = context
        self._keys = keys
        self._links: dict[tuple[int, str, int], zmq.Socket[bytes]] = {}
        self._ranks: dict[zmq.Socket[bytes], int] = {}
        self._scratch: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def ask(self, request: Request) -> None:
        """Send a request, over a new link where the source is new."""
        raw = encode(request.message)
        socket = self._links.get((request.rank, request.address, request.chunk_bytes))
        if socket is None:
            socket = self._open(request)
        try:
            socket.send(raw, zmq.NOBLOCK)
        except zmq.Again:
            # After a frame beyond the limit libzmq ends a link for good, and a plain send would wait for ever.
            self._open(request).send(raw, zmq.NOBLOCK)

    def _open(self, request: Request) -> zmq.Socket[bytes]:
        self._drop_rank(request.rank)
        limit = request.chunk_bytes + _HEADER_ROOM_BYTES
        socket = zmq_sockets.connect(self._context, request.address, self._keys, limit)
        self._links[request.rank, request.address, request.chunk_bytes] = socket
        self._ranks[socket] = request.rank
        if len(self._scratch) < request.chunk_bytes:
            self._scratch = np.empty(request.chunk_bytes, np.uint8)
        return socket

    def _drop_rank(self, rank: int) -> None:
        """A source that moved: its old link would only reconnect forever."""
        for key in [key for key in self._links if key[0] == rank]:
            socket = self._links.pop(key)
            del self._ranks[socket]
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
        num_bytes = 0
        if socket.rcvmore:
            num_bytes = socket.recv_into(self._scratch.data)
        extra_frames = 0
        while socket.rcvmore:
            socket.recv()
            extra_frames += 1
        header = decode(raw)
        rank = self._ranks[socket]
        if not isinstance(header, ChunkHeader) or extra_frames or num_bytes > len(self._scratch):
            raise WireError(
                f"source rank {rank} sent something else than a chunk of at most {len(self._scratch)} bytes"
            )
        return ReceivedChunk(rank, header, self._scratch[:num_bytes])

    def close(self) -> None:
        """Close every link."""
        for socket in self._ranks:
            socket.close(0)
        self._ranks.clear()
        self._links.clear()
