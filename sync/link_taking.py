"""Chunks that come over links of their own (`transports/tcp.py`): asked for, taken, and done without where one breaks.

    links = LinkTaker(subscription, reaches)
    links.ask(request)                 # effects, or None where the source has no such link
    links.take(readable)               # effects of what came
    links.check(now_s)                 # effects of a silence that was too long

Everything is called from the subscriber's thread. A source whose link broke is asked over ZeroMQ for what is missing.
"""

import logging
import time
from collections.abc import Container

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.effects import Effect, Request
from weightcast.sync.errors import ReachError
from weightcast.sync.landing import Landing
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.staging import Staging
from weightcast.sync.subscription import Subscription
from weightcast.sync.transports.reaches import Reaches
from weightcast.sync.transports.tcp import TcpLink

logger = logging.getLogger(__name__)

# Chunks taken from one link before others are looked at again.
_CHUNKS_A_TURN = 8


class LinkTaker:
    """See the module."""

    def __init__(self, subscription: Subscription, reaches: Reaches) -> None:
        self._subscription = subscription
        self._reaches = reaches

    def descriptors(self) -> list[int]:
        """Readable when `take` has something to do."""
        return [link.fileno() for link in self._reaches.links.values()]

    def ask(self, request: Request) -> list[Effect] | None:
        """Send a request over the source's link, if it has one and is to read by itself."""
        link = self._reaches.links.get(request.rank) if request.message.reached else None
        if link is None:
            return None
        try:
            link.ask(request)
        except ReachError as error:
            return self._lose(request.rank, error)
        return []

    def let_go(self) -> None:
        """The version on its way is replaced: keep none of its memory."""
        for link in self._reaches.links.values():
            link.keep(None)

    def take(self, readable: Container[int]) -> list[Effect]:
        """What came over each link that is readable."""
        effects: list[Effect] = []
        for rank, link in self._reaches.links.items():
            if link.fileno() in readable:
                effects += self._take_from(rank, link)
        return effects

    def _take_from(self, rank: int, link: TcpLink) -> list[Effect]:
        effects: list[Effect] = []
        for _ in range(_CHUNKS_A_TURN):
            link.keep(self._find_staging())
            try:
                received = link.receive(rank, self._open_landing)
            except ReachError as error:
                return effects + self._lose(rank, error)
            if received is None:
                break
            # Of a whole chunk the tensors' digests are checked, as of memory that is read.
            header, is_hashed = received.header, received.header.encoding != "dense"
            now_s = time.monotonic()
            effects += self._subscription.land(rank, header, received.buffer, now_s, is_hashed=is_hashed)
        return effects

    def check(self, now_s: float) -> list[Effect]:
        """Give up links whose source owes chunks and gives no sign of itself."""
        effects: list[Effect] = []
        for rank, link in self._reaches.links.items():
            try:
                link.check(now_s)
            except ReachError as error:
                effects += self._lose(rank, error)
        return effects

    def _find_staging(self) -> Staging | None:
        arrival = self._subscription.arrival
        return None if arrival is None or arrival.is_staged else arrival.staging

    def _open_landing(self, rank: int, header: ChunkHeader, num_bytes: int, scratch: ByteArray) -> Landing | None:
        arrival = self._subscription.arrival
        if arrival is None or arrival.staging is None or not arrival.wants(rank, header):
            return None
        return arrival.staging.open_landing(rank, header, num_bytes, scratch)

    def _lose(self, rank: int, error: ReachError) -> list[Effect]:
        logger.warning("engine %s asks source rank %d over ZeroMQ: %s", self._subscription.engine, rank, error)
        self._reaches.give_up(rank, str(error))
        return self._subscription.stop_reaching(rank, time.monotonic())
