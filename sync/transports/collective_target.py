"""An engine-side process that receives whole versions by itself: the other end of `collective_source`.

    with CollectiveReceiver("tcp://10.0.0.1:5700", engine="engine-0") as receiver:
        update = receiver.receive(timeout_s=60)
        update.tensors                                   # all of them, every digest right

One thread a source takes its broadcasts; the engine goes on serving meanwhile. What is received lies in host memory, in
tensors of its own or in `into`. Nothing is given out before every tensor's digest is what its sources computed.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch

from weightcast.sync.errors import DeadlineExceeded, ModelMismatch, PeerLost, WeightcastError, WireError
from weightcast.sync.regions import TensorSpec
from weightcast.sync.transports.collective_backend import check_backend
from weightcast.sync.transports.collective_group import LiveGroups, Rendezvous
from weightcast.sync.transports.collective_layout import CollectiveLayout
from weightcast.sync.transports.collective_receiver import BucketReceiver, Received
from weightcast.sync.transports.collective_roster import Begin, Outcome
from weightcast.sync.transports.collective_source import DEFAULT_LOST_AFTER_S, DEFAULT_TIMEOUT_S, read_layout
from weightcast.sync.transports.collective_staging import TensorAssembler
from weightcast.sync.version import Version, find_model_differences

_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class CollectiveUpdate:
    """A version, complete and verified; `tensors` are in HF order, on the CPU."""

    version: Version
    tensors: dict[str, torch.Tensor]
    num_bytes: int
    stage_s: float


class CollectiveReceiver(AbstractContextManager["CollectiveReceiver"]):
    """One receiving process, under a name that source rank 0 lists among its engines. For one thread.

    `expect` are the tensors that the engine has: a publisher of another model is refused with `ModelMismatch`.
    `timeout_s` bounds the meeting and each version's transfer.
    """

    def __init__(
        self,
        address: str,
        engine: str,
        *,
        backend: str = "gloo",
        expect: Sequence[TensorSpec] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        lost_after_s: float = DEFAULT_LOST_AFTER_S,
    ) -> None:
        self._engine = engine
        self._backend = check_backend(backend)
        self._expect = None if expect is None else tuple(expect)
        self._timeout_s = timeout_s
        self._live: LiveGroups | None = None
        self._layout: CollectiveLayout | None = None
        self._assembler: TensorAssembler | None = None
        self._generation = 0
        self._last: Version | None = None
        self._rendezvous = Rendezvous.join(address, engine, timeout_s=timeout_s, lost_after_s=lost_after_s)

    def connect(self, timeout_s: float | None = None) -> None:
        """Meet the sources and the other engines. Called by the first `receive`."""
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        roster = self._rendezvous.await_roster(self._generation, deadline)
        layout = read_layout(self._rendezvous, roster, deadline)
        if self._expect is not None and (faults := find_model_differences(self._expect, layout.specs)):
            raise ModelMismatch(f"{self._engine} expects another model: {'; '.join(faults[:5])}; {len(faults)} differ")
        self._generation = roster.generation
        self._layout = layout
        self._assembler = TensorAssembler(layout)
        self._live = self._rendezvous.meet(roster, self._backend, deadline)

    def rejoin(self, timeout_s: float | None = None) -> None:
        """After a failure: take part in the next generation. Raises `PeerLost` when it was left out of it."""
        if self._live is not None:
            self._live.close()
            self._live = None
        self.connect(timeout_s)

    def receive(self, timeout_s: float | None = None, into: dict[str, torch.Tensor] | None = None) -> CollectiveUpdate:
        """The next version, once it begins within `timeout_s` (else `DeadlineExceeded`, and it may be called again).

        Raises `WireError` when its bytes were altered, with the groups as they were; `PeerLost` and `DeadlineExceeded`
        when a source is lost or a transfer takes too long, with the groups closed: then `rejoin`.
        """
        if self._live is None:
            self.connect(timeout_s)
        live, layout, assembler = self._live, self._layout, self._assembler
        assert live is not None and layout is not None and assembler is not None
        version = self._await_begin(live, time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s))
        self._last = version
        start_s = time.monotonic()
        assembler.begin(into)
        seals = self._receive_all(version, live, layout, assembler, start_s + self._timeout_s)
        error = ""
        try:
            tensors = assembler.finish(seals)
        except WireError as reason:
            error = str(reason)
            raise WireError(f"version {version} on {self._engine}: {reason}") from None
        finally:
            stage_s = time.monotonic() - start_s
            outcome = Outcome(self._engine, assembler.num_bytes, stage_s, error[:4000])
            self._rendezvous.put(f"outcome/{self._generation}/{version.number}/{self._engine}", outcome)
        return CollectiveUpdate(version, tensors, assembler.num_bytes, stage_s)

    def _await_begin(self, live: LiveGroups, deadline: float) -> Version:
        """Waiting takes place in the store: a broadcast that nobody sends would break its group at its timeout."""
        while True:
            begin = self._rendezvous.find(f"begin/{self._generation}", Begin)
            if begin is not None and (self._last is None or begin.version > self._last):
                return begin.version
            try:
                live.watch()
            except PeerLost as error:
                self._give_up(live, str(error))
                raise PeerLost(f"{self._engine} waited for a version in vain: {error}. Call rejoin()") from error
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"{self._engine} waited for a version, and none began; wait on, or see the sources"
                )
            time.sleep(_POLL_S)

    def _receive_all(
        self,
        version: Version,
        live: LiveGroups,
        layout: CollectiveLayout,
        assembler: TensorAssembler,
        deadline: float,
    ) -> dict[int, bytes]:
        """Every source's share, each in a thread of its own; the seals, by source."""
        received: dict[int, Received] = {}
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            receiver = BucketReceiver(live.groups[rank], rank, self._generation)
            try:
                received[rank] = receiver.receive(layout.plans[rank], assembler.take, deadline, live.watch, version)
            except BaseException as error:
                errors.append(error)
                self._rendezvous.fail(self._generation, f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=run, args=(rank,), name=f"weightcast-from-{rank}") for rank in live.groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not errors:
            return {rank: part.seal for rank, part in received.items()}
        error = errors[0]
        self._give_up(live, f"{type(error).__name__}: {error}")
        if not isinstance(error, WeightcastError):
            raise error
        raise type(error)(
            f"{self._engine} did not get version {version} in generation {self._generation}: {error}. It keeps what it "
            "had; call rejoin() when the sources rebuild"
        ) from error

    def _give_up(self, live: LiveGroups, reason: str) -> None:
        self._live = None
        live.give_up(reason)

    def close(self) -> None:
        """Leave."""
        if self._live is not None:
            self._live.close()
            self._live = None
        self._rendezvous.close()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
