"""A look at a staged version before the fleet hears of it: an engine makes ready for it while it serves another one.

    preview = subscriber.preview(timeout_s=1)      # of a subscriber that `prepares`
    second = load_beside(dict(preview))            # the engine goes on serving
    if not preview.accept(read=True):
        second.drop()                              # a newer version came meanwhile
    update = subscriber.wait(timeout_s=60)         # released by the fleet: swap

Until `accept` or `refuse` the version counts as on its way, so the fleet's policy and every deadline count what the
preparation takes, and what it meets is known before any engine of the fleet pauses.
"""

from collections.abc import Iterator, Mapping

import torch

from weightcast.sync.arrival import Arrival
from weightcast.sync.effects import Tell
from weightcast.sync.errors import VersionError
from weightcast.sync.messages import Failed
from weightcast.sync.regions import TensorSpec
from weightcast.sync.subscriber_loop import SubscriberLoop
from weightcast.sync.subscription import Subscription
from weightcast.sync.version import Version
from weightcast.sync.wanted_tensors import WantedTensors


class Preview:
    """See the module. Iterate as over an `Update`; `accept` or `refuse` once, and keep no tensor beyond that."""

    def __init__(self, subscription: Subscription, loop: SubscriberLoop, arrival: Arrival) -> None:
        assert arrival.tensors is not None
        self.version: Version = arrival.version
        self.specs: tuple[TensorSpec, ...] = arrival.specs
        self._tensors: Mapping[str, torch.Tensor] = arrival.tensors
        self._subscription = subscription
        self._loop = loop
        self._arrival: Arrival | None = arrival

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors.items())

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def wanted(self) -> WantedTensors | None:
        """See `Update`."""
        return self._tensors if isinstance(self._tensors, WantedTensors) else None

    def accept(self, *, read: bool) -> bool:
        """Tell the fleet that the version is staged. False when it is gone: a newer one came, or the publisher left.

        `read` says that nobody needs the tensors any more: where workers share them they may be overwritten, and what
        `wait` returns has none.
        """
        arrival = self._end()
        with self._loop.lock:
            if not self._is_current(arrival):
                return False
            if read:
                try:
                    if arrival.lease is not None:
                        arrival.lease.release()
                except VersionError as error:
                    self._decline(str(error))
                    return False
                arrival.tensors = {}
            arrival.waits_for_engine = False
            self._loop.submit(self._subscription.tell_staged())
            return True

    def refuse(self, reason: str) -> None:
        """Say that the engine cannot take this version, and goes on with the one before."""
        arrival = self._end()
        with self._loop.lock:
            if self._is_current(arrival):
                self._decline(reason)

    def _decline(self, reason: str) -> None:
        self._subscription.arrival = None
        self._loop.submit([Tell(Failed(self.version, reason[:4000]))])

    def _is_current(self, arrival: Arrival) -> bool:
        return self._subscription.arrival is arrival and not self._loop.is_closed

    def _end(self) -> Arrival:
        arrival, self._arrival = self._arrival, None
        if arrival is None:
            raise VersionError(f"version {self.version} was accepted or refused already")
        self._tensors = {}
        return arrival
