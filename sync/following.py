"""What an engine's follower needs of a subscriber, wherever versions come from: a socket or a store.

`WeightSubscriber` and `DiskSubscriber` both are such, and their updates are `VersionUpdate`s.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from weightcast.sync.records import Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version


class StagingStats(Protocol):
    """What it took to stage a version; times are seconds since 1970."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def started_at_s(self) -> float: ...

    @property
    def staged_at_s(self) -> float: ...


class VersionUpdate(Protocol):
    """A version that is complete and verified. Iterate (HF order, CPU tensors), then `commit` or `reject` it once."""

    @property
    def version(self) -> Version: ...

    @property
    def specs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def stats(self) -> StagingStats: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def release(self) -> None:
        """Say before `commit` that all tensors were read. `VersionError` when they were overwritten meanwhile."""
        ...

    def commit(self, pause_s: float = 0.0, spans: Sequence[Span] = ()) -> None: ...

    def reject(self, reason: str) -> None: ...


class VersionSubscriber(Protocol):
    """Where updates come from."""

    def wait(self, timeout_s: float) -> VersionUpdate:
        """The next version. Raises `DeadlineExceeded` when none came in `timeout_s`."""
        ...
