"""What ran when, as JSON lines: the demo's live table and report, and any later tool, read these.

Each rank appends to a file of its own. A phase is `{"process", "phase", "version", "start_s", "end_s"}`, times in
seconds since the Unix epoch; other records are `{"process", "event": "step" | "version", …}` with their figures.

    with EventLog("run/events.jsonl", rank=0) as events:
        with events.phase("optimizer", version=3): ...
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO


class EventLog:
    """Appends events of one rank to `<path>.<rank>`; writes nothing when `path` is `None`."""

    def __init__(self, path: str | None, *, rank: int) -> None:
        self.process = f"trainer-{rank}"
        self._file: TextIO | None = None
        if path is not None:
            target = Path(f"{path}.{rank}")
            target.parent.mkdir(parents=True, exist_ok=True)
            # Line-buffered, because another process follows the file while training goes on.
            self._file = target.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Further events are dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def phase(self, name: str, *, version: int) -> Iterator[None]:
        """Record that the block ran as phase `name` of `version`; also when it raises."""
        start_s = time.time()
        try:
            yield
        finally:
            self.phase_ran(name, version=version, start_s=start_s, end_s=time.time())

    def phase_ran(self, name: str, *, version: int, start_s: float, end_s: float) -> None:
        """Record a phase whose times are known."""
        self._write({"phase": name, "version": version, "start_s": start_s, "end_s": end_s})

    def record(self, event: str, **figures: Any) -> None:
        """Record an event with its figures."""
        self._write({"event": event, **figures})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"process": self.process, **event}) + "\n")
