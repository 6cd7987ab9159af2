"""The subscriber: what an engine-side process holds to receive versions.

    with WeightSubscriber("tcp://127.0.0.1:5600") as subscriber:
        while True:
            update = subscriber.wait(timeout_s=60)     # staged, complete, verified, released by the fleet
            for name, tensor in update:
                ...                                    # load it; nothing here waits for the network
            update.commit(pause_s=...)                 # now it serves this version

Versions are staged in a background thread while the engine goes on serving, into host memory (with `device`, that of
its GPU): one copy of the model.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from weightcast.sync.arrival import Arrival
from weightcast.sync.errors import ConfigError, DeadlineExceeded, ModelMismatch, PeerLost, VersionError
from weightcast.sync.fleet import Role
from weightcast.sync.host.share import HostShare
from weightcast.sync.limits import Limits
from weightcast.sync.preview import Preview
from weightcast.sync.records import Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.shared_subscription import SharedSubscription
from weightcast.sync.subscriber_loop import SubscriberLoop, raise_ended
from weightcast.sync.subscription import Subscription
from weightcast.sync.transports.reaches import Reaches
from weightcast.sync.transports.zmq_sockets import CurveKeys
from weightcast.sync.version import Version
from weightcast.sync.wanted import Want
from weightcast.sync.wanted_tensors import WantedTensors


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What it took to stage a version. Times are seconds since 1970; checksums are of chunks and of tensors.

    `num_bytes` counts bodies as they came, `num_repeats` chunks that were asked for again. `asked_bytes` are those of
    all chunks that hold something wanted, as they are without deltas (0 where another worker of the host receives),
    `kept_bytes` what is staged of them, and `model_bytes` what the publisher's model has.
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

    Of a subscriber with `want`, iterating gives tensors of full shape, made one by one, of which the wanted boxes alone
    may be read; `wanted` has just the boxes.
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


class WeightSubscriber:
    """See the module.

    `engine` names this receiver in reports and errors and must be unique in the fleet; `expect` lists the tensors
    that the engine must get, and a publisher of another model is refused; an `observer` receives no bytes and is
    told of released versions (for a process that drives an engine whose workers are the receivers); it commits each,
    since `publish` waits for it.

    `transport` is "auto" (memory that this host may read where a source exposes some, otherwise connections: by where
    the sources are, and what was measured), "zmq" for ZeroMQ alone, "tcp" for a source's own links, or one kind of
    memory; where that cannot be had, versions are refused with the reason.

    `share` names a group: workers of one host and user that follow one publisher's address under one name receive each
    version once, into memory that all of them read (`sync/host`). Each is a receiver of its own all the same. A
    `HostShare` says more than the name. Where the host has no such memory, the worker receives by itself.

    `want` says which boxes of which tensors this engine uses (every tensor by name, with no box where it has no use for
    it), or is a function of the publisher's tensors that does; it is called by the subscriber's thread, once a model.
    Only chunks that hold some of them are asked for, only the boxes are staged, and all of what is kept is checked.
    Where boxes cannot be those of the publisher's model, every version is refused with `ModelMismatch`. With `share`
    all workers that want the same boxes, say those of all of them together, share one copy of these.

    With `prepares` the fleet is told of a staged version only when the engine has looked at it: a thread of the
    engine's calls `preview`, makes ready for the version while another one serves, and accepts or refuses it.

    `device` is where versions are staged instead of host memory: one copy of the model on the engine's GPU, which a
    source on the same host fills from its own (`cuda_ipc`).
    """

    def __init__(
        self,
        address: str,
        *,
        engine: str | None = None,
        expect: Sequence[TensorSpec] | None = None,
        role: Role = "receiver",
        keys: CurveKeys | None = None,
        limits: Limits | None = None,
        transport: str = "auto",
        share: str | HostShare | None = None,
        want: Want | None = None,
        device: str | torch.device | None = None,
        prepares: bool = False,
    ) -> None:
        if share is not None and device is not None:
            raise ConfigError(f"what workers share lies in host memory, not on {device}; leave out share or device")
        if share is not None and role == "observer":
            raise ConfigError("an observer receives nothing that it could share; leave out role or share")
        if want is not None and role == "observer":
            raise ConfigError("an observer receives nothing, and so wants nothing; leave out role or want")
        share = HostShare(share) if isinstance(share, str) else share
        self.engine = engine if engine is not None else f"{socket.gethostname()}-{os.getpid()}"
        self.address = address
        self._wall_offset_s = time.time() - time.monotonic()
        limits = Limits() if limits is None else limits
        self._subscription = (
            Subscription(self.engine, role, expect, limits, self._wall_offset_s)
            if share is None
            else SharedSubscription(self.engine, expect, limits, self._wall_offset_s)
        )
        self._subscription.model.want = want
        if device is not None:
            self._subscription.shadow = Shadow(device=torch.device(device))
        self._subscription.prepares = prepares and role == "receiver"
        reaches = Reaches(transport, limits.chunk_timeout_s)
        self._loop = SubscriberLoop(self._subscription, address, keys, reaches, limits.links, share)

    @property
    def serving(self) -> Version | None:
        """The version that was committed last."""
        return self._subscription.serving

    @property
    def released(self) -> Version | None:
        """The newest version that the fleet released."""
        return self._subscription.released

    @property
    def is_fenced(self) -> bool:
        """Whether the fleet serves a newer version than this engine: do not send it requests."""
        return self._subscription.is_fenced

    def specs(self, timeout_s: float) -> tuple[TensorSpec, ...]:
        """The publisher's model; waits until one has answered."""
        deadline_s = time.monotonic() + timeout_s
        with self._loop.lock:
            while self._subscription.model.specs is None:
                raise_ended(self._loop.ended)
                self._sleep_until(deadline_s, timeout_s)
            return self._subscription.model.specs

    def wait(self, timeout_s: float) -> Update:
        """The next version: staged, complete, verified, and released by the fleet's policy.

        Raises `DeadlineExceeded` when none came in `timeout_s`, `ModelMismatch` when the publisher has another
        model than expected, `PeerLost` when it fell silent, `WireError` when a version was damaged beyond repair.
        After an error the engine goes on with what it has, and the next call waits for the next version.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._loop.lock:
            if self._subscription.taken is not None:
                version = self._subscription.taken.version
                raise VersionError(f"version {version} is still being loaded; commit() or reject() it first")
            while not self._subscription.is_ready:
                raise_ended(self._loop.ended)
                error = self._subscription.error
                if error is not None:
                    if not (isinstance(error, ModelMismatch) or self._subscription.is_dismissed):
                        self._subscription.error = None
                    raise error
                self._sleep_until(deadline_s, timeout_s)
            return Update(self._subscription, self._loop, self._subscription.take(), self._wall_offset_s)

    def preview(self, timeout_s: float) -> Preview:
        """The version that is staged and waits for the engine to prepare for it; for subscribers that `prepares`.

        While the engine loads a version there is none. Raises `DeadlineExceeded` when none came in `timeout_s`, and
        `PeerLost` when the subscriber was closed; every other error is left to `wait`.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._loop.lock:
            while True:
                raise_ended(self._loop.ended)
                if self._loop.is_closed:
                    raise PeerLost("the subscriber was closed; make a new one")
                arrival = self._subscription.arrival
                waits = arrival is not None and arrival.is_staged and arrival.waits_for_engine
                if arrival is not None and waits and self._subscription.taken is None:
                    return Preview(self._subscription, self._loop, arrival)
                self._sleep_until(deadline_s, timeout_s)

    def _sleep_until(self, deadline_s: float, timeout_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(
                f"engine {self.engine!r} waited {timeout_s:g} s for {self.address}: {self._subscription.describe()}"
            )
        self._loop.lock.wait(min(left_s, 1.0))

    def close(self) -> None:
        """Leave the fleet."""
        self._loop.close()

    def __enter__(self) -> "WeightSubscriber":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
