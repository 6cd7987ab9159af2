"""Chunks that are broadcast, on their way into a subscription: taken as if ZeroMQ had brought them.

    taker = BroadcastTaker(subscription, lock, push)
    broadcasts.connect(taker, taker.plan_of)

`take` and `end` are called by the threads that receive, and change the subscription under the subscriber's lock; what
it wants done then is pushed to the subscriber's own thread, which has the sockets.
"""

import threading
import time
from collections.abc import Callable, Mapping

from weightcast.sync.broadcast_offer import KIND
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.effects import Effect
from weightcast.sync.errors import WireError
from weightcast.sync.layout import SourceLayout
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.subscription import Subscription
from weightcast.sync.transports.collective_buckets import BucketPlan
from weightcast.sync.transports.collective_plan import plan_broadcast
from weightcast.sync.version import Version


class BroadcastTaker:
    """See the module. `push` is called with the lock held."""

    def __init__(
        self, subscription: Subscription, lock: threading.Condition, push: Callable[[list[Effect]], None]
    ) -> None:
        self._subscription = subscription
        self._lock = lock
        self._push = push
        self.announced: Version | None = None
        """The version for which ways were chosen last."""
        self._layouts: Mapping[int, SourceLayout] = {}
        self._plans: dict[int, BucketPlan] = {}

    def plan_of(self, rank: int) -> BucketPlan | None:
        """The buckets of a source's share; None where its layout is not known, or cannot be. With the lock held."""
        try:
            layouts = self._subscription.model.layouts
        except WireError:  # the version is refused for it
            return None
        if layouts is not self._layouts:
            self._layouts, self._plans = layouts, {}
        if rank not in self._plans and rank in layouts:
            self._plans[rank] = plan_broadcast([chunk.num_bytes for chunk in layouts[rank].chunks])
        return self._plans.get(rank)

    def take(self, rank: int, version: Version, index: int, body: ByteArray) -> None:
        """See `BroadcastSink`. Its hash was checked by who received it; the tensors' digests are checked here."""
        header = ChunkHeader(version, index, "dense", None, b"")
        with self._lock:
            self._push(self._subscription.land(rank, header, body, time.monotonic()))

    def end(self, rank: int, version: Version, reason: str) -> None:
        """See `BroadcastSink`."""
        subscription = self._subscription
        with self._lock:
            if self.announced == version and subscription.reached.get(rank) == KIND:
                # The version may not be begun yet: its engine loads another one.
                subscription.reached = {other: kind for other, kind in subscription.reached.items() if other != rank}
            arrival = subscription.arrival
            if arrival is not None and arrival.version == version:
                self._push(arrival.ask_rest(rank, time.monotonic()))
