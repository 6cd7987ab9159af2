"""Seconds spent within some blocks of code, put together.

checking = Stopwatch()
with checking:
    ...
checking.seconds
"""

import time
from dataclasses import dataclass


@dataclass(slots=True)
class Stopwatch:
    """See the module. One thread; blocks do not nest."""

    seconds: float = 0.0
    _started_s: float = 0.0

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started_s
