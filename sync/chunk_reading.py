"""Chunks that an engine reads by itself, out of memory that a source exposes: one by one, or many at once on a device.

reader = ChunkReader(subscription, reaches)
reader.reads(rank, index)              # whether it waits for no bytes of that chunk
reader.read(rank, index)               # they are, valid until the next one is read
begun = reader.begin(received)         # all chunks that a header stands for, on their way; None: one by one
reader.land(begun)
"""

import logging
import time
from dataclasses import replace

import numpy as np

from weightcast.sync.arrival import Arrival
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_landing import RunLanding
from weightcast.sync.effects import Effect
from weightcast.sync.errors import WeightcastError, WireError
from weightcast.sync.host_bytes import ChunkBytes
from weightcast.sync.landing import Landing
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.run_staging import RunBytes, RunStaging
from weightcast.sync.subscription import Subscription
from weightcast.sync.transports.base import ReceivedChunk
from weightcast.sync.transports.reaches import Reaches

logger = logging.getLogger(__name__)


class ChunkReader:
    """See the module. Used by the subscriber's thread."""

    def __init__(self, subscription: Subscription, reaches: Reaches) -> None:
        self._subscription = subscription
        self._reaches = reaches
        self._scratch: ByteArray = np.empty(0, np.uint8)

    def reads(self, rank: int, index: int) -> bool:
        """Whether this engine reads the chunk by itself, and so waits for no bytes of it."""
        arrival = self._subscription.arrival
        return arrival is not None and arrival.reads(rank, index)

    def read(self, rank: int, index: int) -> ChunkBytes:
        """A chunk's bytes out of its source's memory. `WireError` when they are not all there."""
        arrival, reach = self._subscription.arrival, self._reaches.get(rank)
        span = _find_span(arrival, rank, index)
        if arrival is None or reach is None or span is None or span[0] + span[1] > reach.num_bytes:
            raise WireError(f"chunk {index} of source rank {rank} does not lie in memory that this engine reads")
        start_byte, num_bytes = span
        assert arrival.staging is not None
        if arrival.staging.device is not None and (there := reach.device_view(start_byte, num_bytes)) is not None:
            return there
        if (view := reach.view(start_byte, num_bytes)) is not None:
            return view
        if len(self._scratch) < num_bytes:
            self._scratch = np.empty(num_bytes, np.uint8)
        for start, end in arrival.staging.find_spans(rank, index):
            reach.read(start_byte + start, self._scratch[start:end])
        return self._scratch[:num_bytes]

    def begin(self, received: ReceivedChunk) -> ReceivedChunk | None:
        """Begin to copy a run of chunks to their places; None where they come one by one."""
        run = self._begin_run(received.rank, received.header)
        return None if run is None else replace(received, buffer=run)

    def land(self, received: ReceivedChunk) -> list[Effect]:
        """Bring what came, is read now or was begun to its place; what is to be done then."""
        rank, header, body = received.rank, received.header, received.buffer
        assert not isinstance(body, Landing), "ZeroMQ gives whole chunks"
        if isinstance(body, RunLanding):
            effects = self._subscription.land(rank, header, body, time.monotonic(), is_hashed=False)
            body.running.wait()  # also for one that nobody wants any more: the next version is written there
            return effects
        if body is not None or header.encoding != "dense" or not self.reads(rank, header.index):
            return self._subscription.land(rank, header, body, time.monotonic())
        try:
            read = self.read(rank, header.index)
        except (OSError, WeightcastError) as error:
            engine = self._subscription.engine
            logger.warning("engine %s cannot read from source rank %d any more: %s", engine, rank, error)
            self._reaches.give_up(rank, str(error))
            return self._subscription.stop_reaching(rank, time.monotonic())
        return self._subscription.land(rank, header, read, time.monotonic(), is_hashed=False)

    def _begin_run(self, rank: int, header: ChunkHeader) -> RunLanding | None:
        arrival, reach = self._subscription.arrival, self._reaches.get(rank)
        if arrival is None or reach is None or not lands_run(arrival, rank, header):
            return None
        span = _find_span(arrival, rank, header.index, header.count)
        if span is None or span[0] + span[1] > reach.num_bytes:
            return None
        assert isinstance(arrival.staging, RunStaging)
        there: RunBytes | None = reach.scattered
        if there is None:
            there = reach.view(*span) if arrival.staging.device is None else reach.device_view(*span)
        return None if there is None else arrival.staging.begin_run(rank, header, there)


def _find_span(arrival: Arrival | None, rank: int, index: int, count: int = 1) -> tuple[int, int] | None:
    staging = None if arrival is None else arrival.staging
    layout = None if staging is None else staging.layouts.get(rank)
    return None if layout is None else layout.find_span(index, count)


def lands_run(arrival: Arrival, rank: int, header: ChunkHeader) -> bool:
    """Whether the chunks that a header stands for may be landed at once: read, whole, and all of them missing."""
    if header.encoding != "dense" or not arrival.lands_runs(rank) or not arrival.wants(rank, header):
        return False
    assert arrival.staging is not None
    indices = range(header.index, header.index + header.count)
    return all(arrival.reads(rank, index) and arrival.staging.is_missing(rank, index) for index in indices)
