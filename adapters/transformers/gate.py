"""The gate before a model: requests pass one by one, an update closes it and gets the model to itself.

Modes are those of vLLM: `abort` stops running requests at their next token with what they have, `wait` lets them
finish, `keep` freezes them where they are. Several owners may hold the gate closed (an operator, an update); it
opens when the last one lets go.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from weightcast.adapters.engine import PauseMode
from weightcast.sync.errors import DeadlineExceeded, EngineError


class Gate:
    """Counts running requests and keeps them out while closed. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owners: dict[str, PauseMode] = {}
        self._num_running = 0
        self._num_frozen = 0
        self._broken = ""

    @property
    def is_paused(self) -> bool:
        """Whether anybody holds the gate closed."""
        return bool(self._owners)

    @property
    def num_running(self) -> int:
        """Requests inside, frozen ones included."""
        return self._num_running

    @contextmanager
    def admitted(self, timeout_s: float) -> Iterator[None]:
        """Run one request inside the gate. Raises `DeadlineExceeded` when it stays closed for `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._broken or not self._owners, timeout_s):
                raise DeadlineExceeded(
                    f"the engine was paused by {', '.join(self._owners)} for {timeout_s} s; resume it and ask again"
                )
            self._check_whole()
            self._num_running += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def between_tokens(self) -> bool:
        """Called by a running request before each token; freezes it in mode `keep`. False: stop here (`abort`)."""
        with self._changed:
            if "keep" in self._owners.values():
                self._num_frozen += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._broken or "keep" not in self._owners.values())
                self._num_frozen -= 1
            self._check_whole()
            return "abort" not in self._owners.values()

    def close(self, owner: str, mode: PauseMode, timeout_s: float) -> None:
        """Let nobody in and return when nobody moves. On `DeadlineExceeded` the gate is as it was before."""
        with self._changed:
            previous = self._owners.get(owner)
            self._owners[owner] = mode
            self._changed.notify_all()
            if self._changed.wait_for(lambda: self._num_running == self._num_frozen, timeout_s):
                return
            still = self._num_running - self._num_frozen
            self._forget(owner) if previous is None else self._owners.update({owner: previous})
            raise DeadlineExceeded(
                f"{still} requests were still running {timeout_s} s after a pause in mode {mode!r}; "
                "pause with 'keep' or 'abort', or allow more time"
            )

    def open(self, owner: str) -> None:
        """Let requests in again, unless another owner still holds the gate."""
        with self._changed:
            self._forget(owner)

    def break_down(self, reason: str) -> None:
        """From now on every request fails with `EngineError`, frozen and waiting ones included."""
        with self._changed:
            self._broken = reason
            self._changed.notify_all()

    @property
    def broken(self) -> str:
        """Why nothing passes any more; empty while all is well."""
        return self._broken

    def _forget(self, owner: str) -> None:
        self._owners.pop(owner, None)
        self._changed.notify_all()

    def _check_whole(self) -> None:
        if self._broken:
            raise EngineError(f"the engine does not serve: {self._broken}")
