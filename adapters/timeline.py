"""When which phase of which version ran, as records and as JSON lines.

Wall-clock seconds since 1970, so that lines of several processes of one host can be drawn on one axis. A line is
one write to a file opened for appending, so several processes may share a file.

    log = EventLog("engine", Path("events.jsonl"))
    with log.phase("load", version):
        engine.load(version, tensors)
    update.commit(spans=log.take(version))
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightcast.sync import Span, Version

Line = dict[str, str | int | float | bool]


class EventLog:
    """The phases of one process, kept per version until `take`, and appended to `path` unless it is `None`."""

    def __init__(self, process: str, path: Path | None = None) -> None:
        self.process = process
        self._path = path
        self._spans: dict[Version, list[Span]] = {}

    @contextmanager
    def phase(self, name: str, version: Version) -> Iterator[None]:
        """Keep and append how long the body ran, also when it raises."""
        start_s = time.time()
        try:
            yield
        finally:
            span = Span(name, start_s, time.time())
            self._spans.setdefault(version, []).append(span)
            self.record(version, span)

    def record(self, version: Version, span: Span) -> None:
        """Append the line of a phase that somebody else timed; it is not kept."""
        self._append(_line(self.process, span.phase, version, span.start_s, span.end_s))

    def note(self, phase: str, version: Version, **fields: str | int | float | bool) -> None:
        """Append a line for a moment: a refusal and its reason, or the figures of a commit."""
        now_s = time.time()
        self._append(_line(self.process, phase, version, now_s, now_s) | fields)

    def take(self, version: Version) -> tuple[Span, ...]:
        """The spans of `version` so far; they are forgotten here."""
        return tuple(self._spans.pop(version, ()))

    def _append(self, line: Line) -> None:
        if self._path is None:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)


def _line(process: str, phase: str, version: Version, start_s: float, end_s: float) -> Line:
    moment: Line = {"process": process, "phase": phase, "epoch": version.epoch, "version": version.number}
    return moment | {"start_s": start_s, "end_s": end_s}
