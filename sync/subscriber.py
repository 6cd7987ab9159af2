"""The subscriber: what an engine-side process holds to receive versions.

    with WeightSubscriber("tcp://127.0.0.1:5600") as subscriber:
        while True:
            update = subscriber.wait(timeout_s=60)     # staged, complete, verified, released by the fleet
            for name, tensor in update:
                ...                                    # load it; nothing here waits for the network
            update.commit(pause_s=...)                 # now it serves this version

Versions are staged in a background thread while the engine goes on serving, into host memory (with `device`, that of
its GPU): one copy of the model. With `into` they land in the engine's own tensors instead, while it waits.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch

from weightcast.sync.engine_tensors import EngineTensors
from weightcast.sync.errors import (
    ConfigError,
    DeadlineExceeded,
    ModelMismatch,
    PeerLost,
    VersionError,
    WeightcastError,
)
from weightcast.sync.fleet import Role
from weightcast.sync.host.share import HostShare
from weightcast.sync.in_place import Held, InPlaceSubscription
from weightcast.sync.limits import Limits
from weightcast.sync.preview import Preview
from weightcast.sync.regions import TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.shared_subscription import SharedSubscription
from weightcast.sync.subscriber_loop import SubscriberLoop, raise_ended
from weightcast.sync.subscription import Subscription
from weightcast.sync.transports.broadcasts import Broadcasts, check_broadcasts
from weightcast.sync.transports.reaches import Reaches
from weightcast.sync.transports.zmq_sockets import CurveKeys
from weightcast.sync.update import Update
from weightcast.sync.version import Version
from weightcast.sync.wanted import Want


class WeightSubscriber:
    """See the module.

    `engine` names this receiver in reports and errors and must be unique in the fleet; `expect` lists the tensors
    that the engine must get, and a publisher of another model is refused; an `observer` receives no bytes and is
    told of released versions (for a process that drives an engine whose workers are the receivers); it commits each,
    since `publish` waits for it.

    `transport` is "auto" (memory that this host may read where a source exposes some, otherwise connections: by where
    the sources are, and what was measured), "zmq" for ZeroMQ alone, "tcp" for a source's own links, "collective" for
    broadcasts, or one kind of memory; where that cannot be had, versions are refused with the reason. What a broadcast
    does not bring (a version that goes as deltas, damage, a member that died) is asked for over ZeroMQ all the same.

    `share` names a group: workers of one host and user that follow one publisher's address under one name receive each
    version once, into memory that all of them read (`sync/host`). Each is a receiver of its own all the same. A
    `HostShare` says more than the name. Where the host has no such memory, the worker receives by itself.

    `want` says which boxes of which tensors this engine uses (every tensor by name, with no box where it has no use for
    it), or is a function of the publisher's tensors that does; it is called by the subscriber's thread, once a model.
    Only chunks that hold some of them are asked for, only the boxes are staged, and all of what is kept is checked.
    Where boxes cannot be those of the publisher's model, every version is refused with `ModelMismatch`. With `share`
    each worker gives its own: what any of them wants is received once, and each has its own boxes of that. The first
    version waits for who may still come (`HostShare.workers`, `gather_s`); a worker that comes later with boxes that
    are not received yet gets the present version by itself, and the next one with the others.

    With `prepares` the fleet is told of a staged version only when the engine has looked at it: a thread of the
    engine's calls `preview`, makes ready for the version while another one serves, and accepts or refuses it.

    `device` is where versions are staged instead of host memory: one copy of the model on the engine's GPU, which a
    source on the same host fills from its own (`cuda_ipc`).

    `into` has the engine's own tensors by HF name, on one device, and nothing is staged: versions land there while
    the engine is in `wait`, by which it says that it does not serve, and at no other time. They must be those of
    the publisher in names, shapes and dtypes (`ModelMismatch` otherwise); views are welcome, and no two may share
    an element unless they are tied, and share all. From the first byte on they are torn until `wait` returns: when
    it raises instead, the error says so and `held` does, and the next `wait` makes them whole. The engine may write
    to them when it does not wait; what is changed is noticed by the digests and fetched. A version that was
    rejected is in them all the same.
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
        into: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if share is not None and device is not None:
            raise ConfigError(f"what workers share lies in host memory, not on {device}; leave out share or device")
        if share is not None and role == "observer":
            raise ConfigError("an observer receives nothing that it could share; leave out role or share")
        if want is not None and role == "observer":
            raise ConfigError("an observer receives nothing, and so wants nothing; leave out role or want")
        if into is not None:
            _check_in_place(role, {"share": share, "want": want, "prepares": prepares or None, "expect": expect})
        share = HostShare(share) if isinstance(share, str) else share
        self.engine = engine if engine is not None else f"{socket.gethostname()}-{os.getpid()}"
        self.address = address
        self._wall_offset_s = time.time() - time.monotonic()
        limits = Limits() if limits is None else limits
        self._subscription: Subscription
        if into is not None:
            memory = EngineTensors(into, device)
            self._subscription = InPlaceSubscription(self.engine, memory, limits, self._wall_offset_s)
        elif share is not None:
            self._subscription = SharedSubscription(self.engine, expect, limits, self._wall_offset_s)
        else:
            self._subscription = Subscription(self.engine, role, expect, limits, self._wall_offset_s)
        self._subscription.model.want = want
        if device is not None and into is None:
            self._subscription.shadow = Shadow(device=torch.device(device))
        self._subscription.prepares = prepares and role == "receiver"
        refusal = check_broadcasts(transport, {"want": want, "into": into, "share": share})
        broadcasts = Broadcasts(self.engine, transport, refusal)
        reaches = Reaches(transport, limits.chunk_timeout_s, broadcasts)
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

    @property
    def held(self) -> Held | None:
        """What lies in the tensors of `into`: which version is whole, or that they are torn; None without `into`."""
        with self._loop.lock:
            return self._subscription.held if isinstance(self._subscription, InPlaceSubscription) else None

    @property
    def announced(self) -> Version | None:
        """With `into`, the version that was announced and that `wait` will land; None where there is none."""
        with self._loop.lock:
            return self._subscription.announced if isinstance(self._subscription, InPlaceSubscription) else None

    def wait_announced(self, timeout_s: float) -> Version:
        """With `into`, the version that `wait` will land, once there is one: time to stop serving.

        Raises as `wait`, and `ConfigError` without `into`.
        """
        deadline_s = time.monotonic() + timeout_s
        subscription = self._subscription
        if not isinstance(subscription, InPlaceSubscription):
            raise ConfigError("without into versions are staged while the engine serves: wait() for them")
        with self._loop.lock:
            while (version := subscription.announced) is None:
                self._raise_error()
                self._sleep_until(deadline_s, timeout_s)
            return version

    def _raise_error(self) -> None:
        """Raise what the engine has not been told yet; of another model, or a dismissal, it is told each time."""
        raise_ended(self._loop.ended)
        error = self._subscription.error
        if error is not None:
            if not (isinstance(error, ModelMismatch) or self._subscription.is_dismissed):
                self._subscription.error = None
            raise error

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
        After an error the engine goes on with what it has, and the next call waits for the next version. With `into`
        the error says whether the tensors are torn; of these no byte is written once this has returned or raised.
        """
        deadline_s = time.monotonic() + timeout_s
        if isinstance(self._subscription, InPlaceSubscription):
            self._subscription.memory.check_unmoved()
            self._subscription.memory.synchronize()
        with self._loop.lock, self._lending():
            if self._subscription.taken is not None:
                version = self._subscription.taken.version
                raise VersionError(f"version {version} is still being loaded; commit() or reject() it first")
            while not self._subscription.is_ready:
                self._raise_error()
                self._sleep_until(deadline_s, timeout_s)
            return Update(self._subscription, self._loop, self._subscription.take(), self._wall_offset_s)

    @contextmanager
    def _lending(self) -> Iterator[None]:
        """With `into`, the engine's tensors may be written for as long as the block lasts; the lock is held."""
        subscription = self._subscription
        if not isinstance(subscription, InPlaceSubscription):
            yield
            return
        try:
            self._loop.submit(subscription.lend(time.monotonic()))
            yield
        except WeightcastError as error:
            if not (note := subscription.describe_torn()):
                raise
            raise type(error)(f"{error}; {note}") from None
        finally:
            subscription.take_back()
            subscription.memory.synchronize()

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
                waits = arrival is not None and arrival.is_readable and arrival.waits_for_engine
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
        """Leave the fleet. What was committed is in the version's report: the publisher answers, or a second passes."""
        self._loop.close()

    def __enter__(self) -> "WeightSubscriber":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_in_place(role: Role, others: Mapping[str, object]) -> None:
    """`ConfigError` for what does not go together with `into`."""
    if role == "observer":
        raise ConfigError("an observer receives nothing that could land in place; leave out role or into")
    why = {
        "share": "workers that share a copy load from it",
        "want": "all of the publisher's tensors land in place",
        "prepares": "an engine whose tensors are overwritten cannot look at a version before it takes it",
        "expect": "the tensors themselves say what is expected",
    }
    for name, value in others.items():
        if value is not None:
            raise ConfigError(f"{name} does not go together with into: {why[name]}; leave out one of them")
