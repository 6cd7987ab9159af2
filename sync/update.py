"""A version in an engine's hands: what `WeightSubscriber.wait` returns.

update = subscriber.wait(timeout_s=60)
for name, tensor in update:
    ...
update.commit(pause_s=0.04)
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from weightcast.sync.arrival import Arrival
from weightcast.sync.errors import VersionError
from weightcast.sync.records import Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.subscriber_loop import SubscriberLoop
from weightcast.sync.subscription import Subscription
from weightcast.sync.version import Version
from weightcast.sync.wanted_tensors import WantedTensors


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What it took to stage a version. Times are seconds since 1970; checksums are of chunks and of tensors.

    `num_bytes` counts bodies as they came, `num_repeats` chunks that were asked for again. `asked_bytes` are those of
    all chunks that hold something wanted, by any worker that shares the copy, as they are without deltas (0 where
    another one receives), `kept_bytes` those of this engine's boxes, and `model_bytes` what the publisher's model has.
    """

    num_bytes: int
    stage_s: float
    checksums_checked: int
    started_at_s: float
    staged_at_s: float
    transport: str = ""
    num_repeats: int = 0
    asked_bytes: int = 0
    kept_bytes: int = 0
    model_bytes: int = 0


class Update:
    """A version that is complete and verified, where it was staged. Iterate, load, then `commit` or `reject` it once.

    Tensors are in HF order. Memory is reused by a later version only when no tensor of this one is
    alive any more, so a tensor that is kept stays as it is. Not so where workers of a host share the copy: there
    tensors are read-only (a write ends the process) and good until `release` or `commit`; copy what is to be kept.
    Of a subscriber with `into` they are the engine's own, which have the version's bits already, also when it is
    rejected.

    Of a subscriber with `want`, iterating gives tensors of full shape, made one by one, of which the wanted boxes alone
    may be read; `wanted` has just the boxes. Where workers share, both may be views of the shared copy.
    """

    def __init__(
        self, subscription: Subscription, loop: SubscriberLoop, arrival: Arrival, wall_offset_s: float
    ) -> None:
        assert arrival.tensors is not None
        self.version: Version = arrival.version
        self.specs: tuple[TensorSpec, ...] = arrival.specs
        model_bytes = sum(spec.num_bytes for spec in arrival.specs)
        self.stats = UpdateStats(
            arrival.num_bytes,
            arrival.staged_s - arrival.started_s,
            arrival.checksums_checked,
            arrival.started_s + wall_offset_s,
            arrival.staged_s + wall_offset_s,
            arrival.transport,
            arrival.num_repeats,
            arrival.asked_bytes,
            arrival.tensors.num_bytes if isinstance(arrival.tensors, WantedTensors) else model_bytes,
            model_bytes,
        )
        self._tensors: Mapping[str, torch.Tensor] | None = arrival.tensors
        self._lease = arrival.lease
        self._is_ended = False
        self._subscription = subscription
        self._loop = loop
        arrival.tensors = {}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = self._open_tensors()
        return ((name, tensors[name]) for name in list(tensors))

    def __len__(self) -> int:
        return len(self._open_tensors())

    @property
    def wanted(self) -> WantedTensors | None:
        """The boxes that the subscriber wanted; None for one that wanted all."""
        tensors = self._open_tensors()
        return tensors if isinstance(tensors, WantedTensors) else None

    def _open_tensors(self) -> Mapping[str, torch.Tensor]:
        if self._tensors is None:
            raise VersionError(
                f"version {self.version} was committed or rejected already, or released; iterate before, or keep copies"
            )
        return self._tensors

    def check(self) -> None:
        """Raises `VersionError` when the tensors may have been overwritten, and what was read of them is void.

        That happens only where workers of a host share the copy, and to one that loaded for longer than its lease.
        """
        if self._lease is not None and self._tensors is not None:
            self._lease.check()

    def release(self) -> None:
        """Say before `commit` that all tensors were read: where they are shared the next version may overwrite them.

        Raises as `check`, and then the engine holds a mixture of versions.
        """
        self._open_tensors()
        with self._loop.lock:
            self._tensors = None
            if self._lease is not None:
                self._lease.release()

    def commit(self, pause_s: float = 0.0, spans: Sequence[Span] = ()) -> None:
        """Say that the engine serves this version; `pause_s` is how long it answered nobody for it.

        Raises as `check`; the publisher is then told that the engine refused this version.
        """
        self._end()
        with self._loop.lock:
            try:
                if self._lease is not None:
                    self._lease.release()
            except VersionError as error:
                self._loop.submit(self._subscription.reject(str(error), time.monotonic()))
                raise
            self._loop.submit(self._subscription.commit(pause_s, tuple(spans), time.monotonic()))

    def reject(self, reason: str) -> None:
        """Say that the engine cannot take this version, and goes on with the one before."""
        self._end()
        with self._loop.lock:
            if self._lease is not None:
                self._lease.give_up()
            self._loop.submit(self._subscription.reject(reason, time.monotonic()))

    def _end(self) -> None:
        if self._is_ended:
            raise VersionError(f"version {self.version} was committed or rejected already; take the next one")
        self._is_ended, self._tensors = True, None
