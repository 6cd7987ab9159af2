"""The subscriber of a store of versions: what an engine-side process holds to follow one, with no publisher in reach.

    with DiskSubscriber("/shared/versions", engine="engine-0") as subscriber:      # or "s3://bucket/versions"
        while True:
            update = subscriber.wait(timeout_s=60)     # the newest whole version: read, checked, assembled
            for name, tensor in update:
                ...
            update.commit(pause_s=...)

A thread looks for versions and stages them while the engine goes on serving: the first from an anchor and the deltas
upon it, later ones by deltas alone, in place, in one copy of the model in host memory. Where the publisher has a
policy, the engine says in the store what it has staged, and `wait` gives it out once the fleet has released it;
otherwise each engine takes a version when it is whole. `adapters.EngineFollower` drives an engine with it as with a
`WeightSubscriber`.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from weightcast.sync.disk.catalog import Catalog, host_limits
from weightcast.sync.disk.follow_loop import FollowLoop
from weightcast.sync.disk.manifest_checks import ModelLimits
from weightcast.sync.disk.records import MAX_TENSORS, Hashing
from weightcast.sync.disk.staged import StageStats
from weightcast.sync.disk.store import Store, open_store
from weightcast.sync.errors import ConfigError, DeadlineExceeded, VersionError
from weightcast.sync.records import Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """What a subscriber takes on, and how often it looks."""

    max_model_bytes: int | None = None
    """A manifest of a larger model is refused; None: this host's memory."""
    max_tensors: int = MAX_TENSORS
    poll_s: float | None = None
    """How often the store is looked at; None: 0.1 s for a folder, 1 s for all else."""

    def __post_init__(self) -> None:
        if self.max_tensors < 1 or (self.poll_s is not None and self.poll_s <= 0):
            raise ConfigError(f"max_tensors={self.max_tensors} and poll_s={self.poll_s} must be above 0")

    def of_model(self) -> ModelLimits:
        """The limits as manifests are checked against them."""
        host = host_limits()
        return ModelLimits(
            host.max_model_bytes if self.max_model_bytes is None else self.max_model_bytes, self.max_tensors
        )


class DiskUpdate:
    """A version that is complete and verified, in host memory. Iterate, load, then `commit` or `reject` it once.

    Tensors are on the CPU, in HF order; do not write to them. A tensor that is kept stays as it is, and costs the
    memory of a copy when a later version changes it.
    """

    def __init__(
        self,
        loop: FollowLoop,
        version: Version,
        specs: tuple[TensorSpec, ...],
        stats: StageStats,
        tensors: dict[str, torch.Tensor],
    ) -> None:
        self.version = version
        self.specs = specs
        self.stats = stats
        self._loop = loop
        self._tensors: dict[str, torch.Tensor] | None = tensors

    def _open_tensors(self) -> dict[str, torch.Tensor]:
        if self._tensors is None:
            raise VersionError(
                f"version {self.version} was committed or rejected already; iterate before, or keep the tensors"
            )
        return self._tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(list(self._open_tensors().items()))

    def __len__(self) -> int:
        return len(self._open_tensors())

    def check(self) -> None:
        """Nothing overwrites the tensors of a version that was taken; for symmetry with `sync.Update`."""
        self._open_tensors()

    def release(self) -> None:
        """Say before `commit` that all tensors were read; there are none after it."""
        self._open_tensors()
        self._tensors = {}

    def commit(self, pause_s: float = 0.0, spans: Sequence[Span] = ()) -> None:
        """Say that the engine serves this version; `pause_s` is how long it answered nobody for it."""
        self._open_tensors()
        self._tensors = None
        self._loop.release(self.version, serving=True, reason="", pause_s=pause_s, spans=spans)

    def reject(self, reason: str) -> None:
        """Say that the engine cannot take this version, and goes on with the one before; it is not offered again."""
        self._open_tensors()
        self._tensors = None
        self._loop.release(self.version, serving=False, reason=reason)


class DiskSubscriber:
    """See the module.

    `engine` names this receiver in errors and, with `report=True`, in the store, where it then writes what it serves
    (`weightcast versions` shows it); without, a subscriber only reads. `expect` lists the tensors that the engine must
    get: a version of another model is refused. `serving` is the version that the engine was started on (an anchor's
    folder, say), so that only newer ones come. `key` as the publisher has it.

    `agree`: whether the engine is one of the fleet. None: where the publisher has a policy. True: it makes itself known
    at once, and takes nothing but what was released, whatever publisher comes. False: it takes every whole version and
    is never waited for. An engine of the fleet writes to the store, and must have a name that no other one has.
    """

    def __init__(
        self,
        place: "str | Path | Store",
        *,
        engine: str | None = None,
        expect: Sequence[TensorSpec] | None = None,
        serving: Version | None = None,
        report: bool = False,
        limits: DiskLimits | None = None,
        key: bytes | None = None,
        agree: bool | None = None,
    ) -> None:
        limits = DiskLimits() if limits is None else limits
        self.engine = engine if engine is not None else f"{socket.gethostname()}-{os.getpid()}"
        self._store = open_store(place)
        hashing = Hashing(key)
        catalog = Catalog(self._store, hashing, limits.of_model())
        poll_s = self._store.poll_s if limits.poll_s is None else limits.poll_s
        self._loop = FollowLoop(catalog, hashing, self.engine, expect, serving, poll_s, report, agree)

    @property
    def place(self) -> str:
        """The folder or URL."""
        return self._store.url

    @property
    def version(self) -> Version | None:
        """The version that was committed last."""
        return self._loop.serving

    serving = version

    @property
    def newest(self) -> Version | None:
        """The newest whole version that the store was seen to have."""
        return self._loop.newest

    @property
    def released(self) -> Version | None:
        """The newest version that the fleet was seen to have released; None where versions need no release."""
        return self._loop.agreement.released

    @property
    def is_fenced(self) -> bool:
        """Whether the fleet serves a newer version than this engine: do not send it requests."""
        released, serving = self.released, self.version
        return released is not None and (serving is None or serving < released)

    @property
    def spoiled(self) -> tuple[Version, ...]:
        """Versions of which an anchor or a delta was found damaged; that one is not used again."""
        return self._loop.spoiled

    def specs(self, timeout_s: float) -> tuple[TensorSpec, ...]:
        """The model that the newest version has; waits until there is one."""
        deadline_s = time.monotonic() + timeout_s
        with self._loop.lock:
            while self._loop.specs is None:
                self._loop.raise_error()
                self._sleep_until(deadline_s, timeout_s)
            return self._loop.specs

    def wait(self, timeout_s: float) -> DiskUpdate:
        """The newest version: read, complete and verified.

        Raises `DeadlineExceeded` when none was ready in `timeout_s` (staging goes on), `DamagedVersion` when one cannot
        be used, `ModelMismatch` when it is of another model, `StorageError` when the store cannot be read. After an
        error the engine goes on with what it has, and the next call gives the newest that can be had.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._loop.lock:
            if self._loop.taken is not None:
                raise VersionError(f"version {self._loop.taken} is still being loaded; commit() or reject() it first")
            self._loop.raise_error()
            while self._loop.ready is None:
                self._sleep_until(deadline_s, timeout_s)
                self._loop.raise_error()
            version, stats = self._loop.ready
            tensors, specs = self._loop.take()
            return DiskUpdate(self._loop, version, specs, stats, tensors)

    def _sleep_until(self, deadline_s: float, timeout_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(
                f"engine {self.engine!r} waited {timeout_s:g} s for {self.place}: {self._loop.describe()}"
            )
        self._loop.lock.wait(min(left_s, 1.0))

    def close(self) -> None:
        """Stop looking. Tensors that are kept stay."""
        self._loop.close()
        self._store.close()

    def __enter__(self) -> "DiskSubscriber":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
