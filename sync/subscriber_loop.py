"""The subscriber's thread: it owns an engine's sockets, and carries out what the subscription decides.

It stages versions in the background, whether or not the engine is waiting for one. The engine's threads look at the
subscription under `lock`, which is notified after every step.
"""

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import zmq

from weightcast.sync.acquaintance import is_farewell
from weightcast.sync.broadcast_taking import BroadcastTaker
from weightcast.sync.chunk_reading import ChunkReader
from weightcast.sync.device_landing import RunLanding
from weightcast.sync.effects import Effect, Read, Request, Tell
from weightcast.sync.errors import AddressError, PeerLost, ReachError, WireError
from weightcast.sync.host.share import HostShare
from weightcast.sync.host.worker import HostWorker
from weightcast.sync.link_taking import LinkTaker
from weightcast.sync.messages import Announce, Layout, Staged, decode, encode
from weightcast.sync.schema import MAX_MESSAGE_BYTES
from weightcast.sync.shared_subscription import SharedSubscription
from weightcast.sync.subscription import Subscription
from weightcast.sync.transports import zmq_sockets
from weightcast.sync.transports.base import ReceivedChunk
from weightcast.sync.transports.reaches import Reaches
from weightcast.sync.transports.zmq_chunks import ZmqChunkClient
from weightcast.sync.transports.zmq_sockets import CurveKeys

logger = logging.getLogger(__name__)

_POLL_MS = 100
_GOODBYE_S = 1.0
# Chunks taken from one link before the others are looked at again.
_CHUNKS_A_TURN = 8


class SubscriberLoop:
    """Sockets and thread of one engine."""

    def __init__(
        self,
        subscription: Subscription,
        address: str,
        keys: CurveKeys | None,
        reaches: Reaches,
        num_links: int,
        share: HostShare | None = None,
    ) -> None:
        self.lock = threading.Condition()
        self.ended: Exception | None = None
        self._subscription = subscription
        self._stopping = False
        self._outbox: list[Effect] = []
        self._address, self._keys = address, keys
        self._reaches = reaches
        self._reader = ChunkReader(subscription, reaches)
        self._context, _ = zmq_sockets.make_context(None)
        try:
            self._wake_in = self._context.socket(zmq.PAIR)
            self._wake_in.bind("inproc://wake")
            self._wake_out = self._context.socket(zmq.PAIR)
            self._wake_out.connect("inproc://wake")
            self._control = self._connect()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._client = ZmqChunkClient(self._context, keys, num_links=num_links)
        self._links = LinkTaker(subscription, reaches)
        self._broadcasts = BroadcastTaker(subscription, self.lock, self._push)
        reaches.broadcasts.connect(self._broadcasts, self._broadcasts.plan_of)
        self._poller, self._polled = zmq.Poller(), list[Any]()
        self._worker: HostWorker | None = None
        if share is not None:
            assert isinstance(subscription, SharedSubscription)
            self._worker = HostWorker(subscription, address, share, self._reach, self._awake)
        self._thread = threading.Thread(target=self._run, name=f"weightcast-{subscription.engine}", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._stopping

    def submit(self, effects: list[Effect]) -> None:
        """Carry out effects that a call of the engine's caused. Call with `lock` held."""
        raise_ended(self.ended)
        if self._stopping:
            raise PeerLost("the subscriber was closed; make a new one")
        self._outbox += effects
        zmq_sockets.wake(self._wake_out)

    def _push(self, effects: list[Effect]) -> None:
        """Carry out effects of what another thread of this subscriber did, which holds the lock."""
        if self._stopping or self.ended is not None:
            return
        if effects:
            self._outbox += effects
            zmq_sockets.wake(self._wake_out)
        if self._subscription.awaits_engine or self._subscription.error is not None:
            self.lock.notify_all()

    def _awake(self) -> None:
        """From any thread: look again at what there is to do."""
        with self.lock:
            if not self._stopping and self.ended is None:
                zmq_sockets.wake(self._wake_out)

    def close(self) -> None:
        """Send what is due, say goodbye, wait until that has arrived (a second at most), and close every socket."""
        with self.lock:
            if self._stopping:
                return
            self._stopping = True
            self.lock.notify_all()
            if self.ended is None:
                zmq_sockets.wake(self._wake_out)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            with self.lock:
                self._carry_out(self._subscription.hello())
            while not self._stopping:
                ready: Mapping[Any, int] = dict(self._renew_poller().poll(_POLL_MS))
                with self.lock:
                    self._step(ready)
                    if self._brought_news(ready):
                        self.lock.notify_all()
            with self.lock:
                self._carry_out([*self._outbox, *self._subscription.leave()])
            if self._subscription.known.awaits_goodbye:
                # A socket that is closed while something comes in may lose what it has sent.
                zmq_sockets.read_until(self._control, is_farewell, _GOODBYE_S)
        except Exception as error:  # whatever it is, the engine must hear of it instead of waiting
            logger.exception("the subscriber's thread of engine %s ended", self._subscription.engine)
            with self.lock:
                self.ended = error
                self.lock.notify_all()
        finally:
            if self._worker is not None:
                with self.lock:
                    self._worker.close()
            self._control.linger = 500
            for socket in (self._wake_in, self._wake_out, self._control):
                socket.close()
            self._client.close()
            self._reaches.close()
            self._context.destroy(linger=500)

    def _renew_poller(self) -> zmq.Poller:
        """Of all sockets; the one before, where they are the same."""
        sockets: list[Any] = [self._wake_in, self._control, *self._client.sockets(), *self._links.descriptors()]
        if self._worker is not None:
            sockets += [follower.fileno() for follower in self._worker.sockets()]
        if sockets != self._polled:
            self._poller, self._polled = zmq.Poller(), sockets
            for socket in sockets:
                self._poller.register(socket, zmq.POLLIN)
        return self._poller

    def _brought_news(self, ready: Mapping[Any, int]) -> bool:
        """Whether the engine's threads may find what they wait for; that some chunk came is not worth waking them."""
        state = self._subscription
        return self._control in ready or self._wake_in in ready or state.awaits_engine or state.error is not None

    def _step(self, ready: Mapping[Any, int]) -> None:
        if self._wake_in in ready:
            while self._wake_in.poll(0):
                self._wake_in.recv()
        outbox, self._outbox = self._outbox, []
        self._carry_out(outbox)
        if self._control in ready:
            while self._control.poll(0):
                self._hear(self._control.recv_multipart())
        for socket in self._client.sockets():
            if socket in ready:
                self._take_chunks(socket)
        self._carry_out(self._links.take(ready))
        self._carry_out(self._subscription.tick(time.monotonic()))
        self._carry_out(self._links.check(time.monotonic()))
        if self._worker is not None:
            self._carry_out(self._worker.step(time.monotonic()))
            assert isinstance(self._subscription, SharedSubscription)
            if self._subscription.awaits_lease:  # it was read at once
                self._carry_out(self._worker.step(time.monotonic()))

    def _hear(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise WireError(f"a message of {len(frames)} frames; one was expected")
            message = decode(frames[0])
            # Of a host's workers only the one that receives needs ways to the sources.
            refusal = self._reach(message) if self._worker is None and isinstance(message, Announce) else ""
            self._carry_out(self._subscription.receive(message, time.monotonic()))
            if self._worker is None and isinstance(message, Layout):
                self._reaches.broadcasts.prepare(message.tickets)
            if refusal:
                self._carry_out(self._subscription.give_up(refusal))
        except WireError as error:
            logger.warning("engine %s ignored a message of its publisher: %s", self._subscription.engine, error)

    def _reach(self, announce: Announce) -> str:
        """Choose the way to each source; why there is none."""
        if self._subscription.arrival is None or self._subscription.arrival.version != announce.version:
            self._links.let_go()
        try:
            num_sources = self._subscription.model.num_sources
            self._subscription.reached = self._reaches.renew(announce.tickets, num_sources, announce.version)
            self._broadcasts.announced = announce.version
        except ReachError as error:
            return f"engine {self._subscription.engine!r}: {error}"
        return ""

    def _take_chunks(self, socket: zmq.Socket[bytes]) -> None:
        begun: ReceivedChunk | None = None
        num_turns = 0
        while True:
            takes_more = num_turns < _CHUNKS_A_TURN and socket in self._client.sockets()
            try:
                received = self._client.receive(socket) if takes_more else None
            except WireError as error:
                logger.warning("engine %s ignored a chunk: %s", self._subscription.engine, error)
                received = None
            # A device copies one run while the one before is counted here, and the next is asked for.
            is_run = received is not None and received.header.count > 1
            before, begun = begun, self._reader.begin(received) if received is not None and is_run else None
            if before is not None:
                self._carry_out(self._reader.land(before))
            elif received is None:
                return
            if begun is not None and isinstance(begun.buffer, RunLanding) and begun.buffer.running.is_done:
                self._carry_out(self._reader.land(begun))  # the next one is asked for at once
                num_turns, begun = num_turns + 1, None
            elif received is not None:
                num_turns += 1 if begun is not None else received.header.count
                for one in received.one_by_one() if begun is None else ():
                    self._carry_out(self._reader.land(one))

    def _begin_read(self, read: Read) -> ReceivedChunk | None:
        """Begin to read what its source said is there; where that cannot be, the source is asked for it."""
        begun = self._reader.begin(ReceivedChunk(read.rank, read.header, None))
        if begun is None:
            self._carry_out(self._subscription.ask(read.rank, read.header, time.monotonic()))
        return begun

    def _carry_out(self, effects: list[Effect]) -> None:
        begun = [self._begin_read(effect) for effect in effects if isinstance(effect, Read)]
        for effect in effects:
            if isinstance(effect, Tell):
                if isinstance(effect.message, Staged):
                    self._reaches.note_rate(effect.message.transport, effect.message.num_bytes, effect.message.stage_s)
                self._tell(encode(effect.message))
            elif isinstance(effect, Request) and not self._ask(effect):
                break
        # A device works while others are asked, and on one run while the one before is noted.
        for received in filter(None, begun):
            self._carry_out(self._reader.land(received))

    def _tell(self, raw: bytes) -> None:
        try:
            self._control.send(raw, zmq.NOBLOCK)
        except zmq.Again:
            # libzmq ends a link for good after a refused handshake or a frame beyond the limit; a plain send would
            # then wait for ever. Over a new link the publisher does not know this engine, and it is greeted again.
            self._control.close(0)
            self._control = self._connect()
            # On a busy machine the new link may be refused before this line; the next ping tries another one.
            with suppress(zmq.Again):
                self._control.send(raw, zmq.NOBLOCK)

    def _connect(self) -> zmq.Socket[bytes]:
        return zmq_sockets.connect(self._context, self._address, self._keys, MAX_MESSAGE_BYTES)

    def _ask(self, request: Request) -> bool:
        if (effects := self._links.ask(request)) is not None:
            self._carry_out(effects)
            return True
        try:
            self._client.ask(request)
        except (AddressError, zmq.ZMQError) as error:
            # The address came over the wire.
            reason = f"source rank {request.rank} cannot be reached at {request.address!r}: {error}"
            self._carry_out(self._subscription.give_up(reason))
            return False
        return True


def raise_ended(ended: Exception | None) -> None:
    """Raise what ended the thread, if anything did."""
    if ended is not None:
        raise PeerLost(f"the subscriber's thread ended: {ended!r}") from ended
