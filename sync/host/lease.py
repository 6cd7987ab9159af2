"""A lease: a version of a shared copy that stays as it is while a worker loads it."""

from collections.abc import Callable, Mapping
from types import TracebackType

import torch

from weightcast.sync.host.pool import SharedPool, Staged
from weightcast.sync.version import Version


class Lease:
    """`tensors` of `version`, by name, to be read and not to be written, until `release`.

    with follower.wait(after=serving, timeout_s=60) as lease:
        engine.load(lease.tensors)
    # here it is certain that what was loaded is lease.version
    """

    def __init__(self, pool: SharedPool, staged: Staged, give_back: Callable[[], None]) -> None:
        self.version: Version = staged.version
        self.tensors: Mapping[str, torch.Tensor] = pool.tensors
        self.wanted = pool.wanted
        """Of which boxes there are tensors; None where they are the model's."""
        self._pool = pool
        self._staged = staged
        self._give_back: Callable[[], None] | None = give_back

    def check(self) -> None:
        """`VersionError` when the tensors may have changed since the lease began; what was read of them is void."""
        self._pool.check_unchanged(self._staged)

    def release(self) -> None:
        """Give the lease back, after a `check`; twice is no matter. A dead leader's memory is there still."""
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            try:
                self.check()
            finally:
                give_back()

    def give_up(self) -> None:
        """Give the lease back, whatever became of the tensors: nobody loads them."""
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            give_back()

    @property
    def is_void(self) -> bool:
        """Whether the tensors may have changed since the lease began."""
        return not self._pool.is_unchanged(self._staged)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.release()
        else:
            self.give_up()
