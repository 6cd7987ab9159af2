"""An errand: one call that may take long, run beside a loop that must not wait for it.

errand = Errand(lambda: join_host_share(...), wake)     # `wake` is called when it has ended
if errand.is_done:
    member = errand.result()
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Errand(Generic[T]):
    """See the module. Its thread ends with the process, and is waited for by nobody."""

    def __init__(self, call: Callable[[], T], wake: Callable[[], None]) -> None:
        self._call = call
        self._wake = wake
        self._lock = threading.Lock()
        self._result: T | None = None
        self._error: Exception | None = None
        self._is_done = False
        self._is_abandoned = False
        threading.Thread(target=self._run, name="weightcast-errand", daemon=True).start()

    @property
    def is_done(self) -> bool:
        """Whether `result` returns or raises."""
        return self._is_done

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody wants the result any more: the call may end early."""
        return self._is_abandoned

    def result(self) -> T:
        """What the call returned, or what it raised."""
        assert self._is_done, "the errand has not ended"
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # there is no error, so this is it

    def abandon(self) -> None:
        """Nobody will ask for the result: it is closed, now or when it is there, if it can be."""
        with self._lock:
            self._is_abandoned = True
            is_done = self._is_done
        if is_done:
            _close(self._result)

    def _run(self) -> None:
        try:
            self._result = self._call()
        except Exception as error:  # whoever asks for the result must hear of it, whatever it is
            self._error = error
        with self._lock:
            self._is_done = True
            is_abandoned = self._is_abandoned
        if is_abandoned:
            _close(self._result)
        else:
            self._wake()


def _close(result: Any) -> None:
    if result is not None:
        result.close()
