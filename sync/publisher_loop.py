"""The publisher's thread: it owns every socket of a source, and carries out what the coordinator decides.

Rank 0 runs the coordinator and binds the address; every other rank is its client. All ranks serve their own chunks.
The trainer's thread talks to this one through `submit` (run this in the loop) and `watch` (wait for a result).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import zmq

from weightcast.sync.coordinator import Coordinator
from weightcast.sync.errors import DeadlineExceeded, PeerLost, SourceError, WeightcastError, WireError
from weightcast.sync.fleet import EngineStatus
from weightcast.sync.messages import (
    Assigned,
    Goodbye,
    Message,
    Packed,
    Packing,
    Ping,
    Pong,
    Published,
    SourceHello,
    decode,
    encode,
)
from weightcast.sync.records import Ticket
from weightcast.sync.roster import Outgoing
from weightcast.sync.schema import MAX_MESSAGE_BYTES
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports import zmq_sockets
from weightcast.sync.transports.servers import ChunkServers
from weightcast.sync.transports.zmq_sockets import CurveKeys

logger = logging.getLogger(__name__)

_POLL_MS = 100
_PING_EVERY_S = 0.5
_LINGER_MS = 500
# The coordinator's own process takes part in its protocol under this routing id, which ZeroMQ never gives.
_SELF = b""


class PublisherLoop:
    """Sockets and thread of one source. `coordinator` is given on rank 0 only."""

    def __init__(
        self,
        hello: SourceHello,
        address: str,
        keys: CurveKeys | None,
        coordinator: Coordinator | None,
        lost_after_s: float,
        kinds: Sequence[str] = (),
    ) -> None:
        self.coordinator = coordinator
        self.assigned: Assigned | None = None
        self.published: Published | None = None
        self.failure: WeightcastError | None = None
        self._hello = hello
        self._lost_after_s = lost_after_s
        self._lock = threading.Condition()
        self._inbox: deque[Callable[[float], list[Outgoing]]] = deque()
        self._stopping = False
        self._pinged_s = self._heard_s = time.monotonic()
        self._context, self._guard = zmq_sockets.make_context(keys)
        try:
            self._open(address, keys, kinds)
        except BaseException:
            self._close_context()
            raise
        self._thread = threading.Thread(target=self._run, name=f"weightcast-publisher-{hello.rank}", daemon=True)
        self._thread.start()

    def _open(self, address: str, keys: CurveKeys | None, kinds: Sequence[str]) -> None:
        self._wake_in = self._context.socket(zmq.PAIR)
        self._wake_in.bind("inproc://wake")
        self._wake_out = self._context.socket(zmq.PAIR)
        self._wake_out.connect("inproc://wake")
        if self.coordinator is None:
            self.control = zmq_sockets.connect(self._context, address, keys, MAX_MESSAGE_BYTES)
            self.address = address
        else:
            self.control, self.address = zmq_sockets.bind(self._context, address, keys, MAX_MESSAGE_BYTES)
        where = zmq_sockets.data_address(address, self._hello.rank)
        self.server = ChunkServers(self._context, where, keys, self._hello.rank, kinds, self._lost_after_s)
        self._hello = replace(self._hello, address=self.server.address, tickets=self.server.early_tickets)

    # The trainer's side

    def submit(self, work: Callable[[float], list[Outgoing]]) -> None:
        """Run `work(now_s)` in the loop and send what it returns."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if self._stopping:
                raise SourceError("the publisher was closed; make a new one")
            self._inbox.append(work)
            zmq_sockets.wake(self._wake_out)

    def watch(self, ready: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
        """Wait until `ready()`; `DeadlineExceeded` names `what()` was waited for."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            while not ready():
                if self.failure is not None:
                    raise self.failure
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineExceeded(f"source rank {self._hello.rank} waited {timeout_s:g} s for {what()}")
                self._lock.wait(min(left_s, 1.0))

    def withdraw(self, timeout_s: float) -> None:
        """Serve nothing until the next offer, so that the snapshot's memory may be written."""
        done = threading.Event()

        def drop(now_s: float) -> list[Outgoing]:
            self.server.drop()
            done.set()
            return []

        self.submit(drop)
        self.watch(done.is_set, timeout_s, lambda: "its own thread")

    def offer(self, snapshot: Snapshot, tickets: tuple[Ticket, ...], deadline_s: float) -> None:
        """Serve a snapshot, chunk by chunk as it is packed, and tell the coordinator that it begins.

        `tickets` are to the memory that is packed into.
        """

        def hand_over(now_s: float) -> list[Outgoing]:
            self.server.hold(snapshot)
            packing = Packing(snapshot.version.number, (*tickets, *self.server.tickets), snapshot.is_all_ready)
            if self.coordinator is None:
                return [Outgoing(_SELF, packing)]
            return self.coordinator.add_packing(_SELF, packing, now_s, deadline_s)

        self.submit(hand_over)

    def nudge(self) -> None:
        """More of the snapshot is ready."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if not self._wake_out.closed:
                zmq_sockets.wake(self._wake_out)

    def seal(self, part: Packed) -> None:
        """Tell the coordinator that all of the snapshot is packed."""

        def hand_over(now_s: float) -> list[Outgoing]:
            if self.coordinator is None:
                return [Outgoing(_SELF, part)]
            return self.coordinator.add_part(_SELF, part, now_s)

        self.submit(hand_over)

    def engines(self) -> tuple[EngineStatus, ...]:
        """What rank 0 knows of the engines; nothing on other ranks."""
        with self._lock:
            return () if self.coordinator is None else tuple(self.coordinator.engines.values())

    def close(self) -> None:
        """Say goodbye and close every socket."""
        with self._lock:
            self._stopping = True
            if not self._wake_out.closed:  # the thread closes it, under this lock
                zmq_sockets.wake(self._wake_out)
        self._thread.join(timeout=10)

    # The loop

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._wake_in, self.control, self.server.socket):
            poller.register(socket, zmq.POLLIN)
        try:
            with self._lock:
                self._send_all([Outgoing(_SELF, self._hello)] if self.coordinator is None else self._join())
            while not self._stopping:
                ready = dict(poller.poll(_POLL_MS))
                with self._lock:
                    self._step(ready, time.monotonic())
                    if set(ready) != {self.server.socket}:  # requests for chunks are no news to those who wait
                        self._lock.notify_all()
                self.server.answer()
            self._say_goodbye()
        except zmq.Again:
            with self._lock:
                self.failure = self.failure or PeerLost(
                    f"rank 0 at {self.address} ended the link of source rank {self._hello.rank}: "
                    "it has other CurveZMQ keys, or is no weightcast publisher"
                )
                self._lock.notify_all()
        except Exception as error:  # whatever it is, the trainer must hear of it instead of waiting
            logger.exception("the publisher's thread of source rank %d ended", self._hello.rank)
            with self._lock:
                self.failure = self.failure or SourceError(f"the publisher's thread ended: {error!r}")
                self._lock.notify_all()
        finally:
            self._wake_in.close(0)
            with self._lock:
                self._wake_out.close(0)
            # The last messages to engines and sources may still be on their way: they have a moment to leave.
            self.control.close(_LINGER_MS)
            self.server.close()
            self._close_context()
            if self.coordinator is not None:
                zmq_sockets.remove_ipc_file(self.address)

    def _step(self, ready: dict[zmq.Socket[bytes], int], now_s: float) -> None:
        if self._wake_in in ready:
            while self._wake_in.poll(0):
                self._wake_in.recv()
        while self._inbox:
            self._send_all(self._inbox.popleft()(now_s))
        if self.control in ready:
            while self.control.poll(0):
                self._send_all(self._receive(self.control.recv_multipart(), now_s))
        self._send_all(self._tick(now_s))
        if self.coordinator is not None and self.coordinator.fault and self.failure is None:
            self.failure = SourceError(self.coordinator.fault)

    def _join(self) -> list[Outgoing]:
        assert self.coordinator is not None
        return self.coordinator.add_source(_SELF, self._hello)

    def _receive(self, frames: list[bytes], now_s: float) -> list[Outgoing]:
        peer, *rest = frames if self.coordinator is not None else [_SELF, *frames]
        try:
            if len(rest) != 1:
                raise WireError(f"a message of {len(rest)} frames; one was expected")
            message = decode(rest[0])
            if self.coordinator is None:
                return self._hear(message, now_s)
            if isinstance(message, SourceHello):
                return self.coordinator.add_source(peer, message)
            if isinstance(message, Packing):
                return self.coordinator.add_packing(peer, message, now_s)
            if isinstance(message, Packed):
                return self.coordinator.add_part(peer, message, now_s)
            return self.coordinator.receive(peer, message, now_s)
        except WireError as error:
            # A stranger's noise must not stop the run; a peer that speaks wrongly is left without an answer.
            logger.warning("ignored a message from peer %s: %s", peer.hex() or "coordinator", error)
            return []

    def _hear(self, message: Message, now_s: float) -> list[Outgoing]:
        """A message of the coordinator to this source."""
        self._heard_s = now_s
        if isinstance(message, Assigned):
            self.assigned = message
        elif isinstance(message, Published):
            self.published = message
        elif isinstance(message, Goodbye) and self.failure is None:
            ended = PeerLost(f"rank 0 at {self.address} ended or refused this source: {message.reason}")
            self.failure = SourceError(message.reason) if self.assigned is None else ended
        elif isinstance(message, Pong) and not message.known:
            return [Outgoing(_SELF, self._hello)]
        return []

    def _tick(self, now_s: float) -> list[Outgoing]:
        if self.coordinator is not None:
            return self.coordinator.tick(now_s)
        if self.assigned is not None and now_s - self._heard_s > self._lost_after_s and self.failure is None:
            self.failure = PeerLost(f"rank 0 at {self.address} was silent for {self._lost_after_s:g} s")
        if now_s - self._pinged_s < _PING_EVERY_S:
            return []
        self._pinged_s = now_s
        return [Outgoing(_SELF, Ping())]

    def _send_all(self, outgoing: list[Outgoing]) -> None:
        # Announcements go to many engines: one encoding serves them all.
        encoded: dict[int, bytes] = {}
        for item in outgoing:
            if self.coordinator is not None and item.peer == _SELF:
                self._hear(item.message, time.monotonic())
                continue
            raw = encoded.setdefault(id(item.message), b"") or encode(item.message)
            encoded[id(item.message)] = raw
            self.control.send_multipart([item.peer, raw] if self.coordinator is not None else [raw], zmq.NOBLOCK)

    def _say_goodbye(self) -> None:
        if self.coordinator is None:
            return
        goodbye = encode(Goodbye("the publisher was closed", final=False))
        for peer, engine in self.coordinator.engines.items():
            if not engine.lost:
                self.control.send_multipart([peer, goodbye])

    def _close_context(self) -> None:
        if self._guard is not None:
            self._guard.stop()
        self._context.destroy(linger=_LINGER_MS)
