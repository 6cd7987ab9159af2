"""Publish reports as a file of JSON lines, one line a publish, for tools that look at a run later.

A line is one write to a file opened for appending, so a run that is resumed goes on in the same file, and a reader may
follow it while it grows. What comes back is checked field by field, as messages are.

    log = ReportLog(Path("run/reports.jsonl"))
    log.append(publisher.publish(version=7))          # on rank 0: reports are alike on all ranks
    for report in read_reports(Path("run/reports.jsonl")): ...
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightcast.sync.errors import ConfigError, StorageError, WireError
from weightcast.sync.messages import DELTA_MODES
from weightcast.sync.records import MAX_CHUNKS, MAX_SOURCES, MAX_SPANS, EngineReport, SourceReport, Span
from weightcast.sync.report import PublishReport
from weightcast.sync.schema import Check, choice, many, optional, real, show, text, uint
from weightcast.sync.version import Version

FORMAT = "weightcast.publish_report/1"
MAX_ENGINES = 1 << 20


class ReportLog:
    """Appends to `path`, whose folder is made where it is missing. Raises `StorageError` when it cannot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Now, because an address that cannot be written to should not first show after a step of training.
            self._write(b"")
        except OSError as error:
            raise self._cannot(error) from error

    def append(self, report: PublishReport) -> None:
        """Add one line."""
        try:
            self._write(dump_report(report).encode() + b"\n")
        except OSError as error:
            raise self._cannot(error) from error

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)

    def _cannot(self, error: OSError) -> StorageError:
        return StorageError(f"cannot append a report to {self.path}: {error}; name a file in a folder with room")


def dump_report(report: PublishReport) -> str:
    """The report as one line of JSON, without its end."""
    return json.dumps({"format": FORMAT} | asdict(report), allow_nan=False)


def is_report(fields: object) -> bool:
    """Whether a decoded JSON line claims to be a report, of this format or another."""
    return isinstance(fields, dict) and str(fields.get("format", "")).startswith("weightcast.publish_report/")


def parse_report(fields: object) -> PublishReport:
    """The report of a decoded JSON line. Raises `WireError` when it is none, or of another format."""
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        got = show(fields.get("format")) if isinstance(fields, dict) else show(fields)
        raise WireError(
            f"a report of the format {FORMAT!r} was expected, got {got}; read it with the weightcast it is of"
        )
    report: PublishReport = _REPORT({name: value for name, value in fields.items() if name != "format"})
    return report


def read_reports(path: Path) -> Iterator[PublishReport]:
    """The reports of a file, in its order. Raises `ConfigError` with the line's number at the first that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield parse_report(json.loads(line))
                except ValueError as error:
                    raise ConfigError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}; name a file that `publish.report_log` wrote") from error


def _mapping(cls: type[Any], **checks: Check) -> Check:
    """A JSON object with exactly the fields of `cls`, each of which passes its check; comes back as a `cls`."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict) or value.keys() != checks.keys():
            got = sorted(map(str, value))[:20] if isinstance(value, dict) else show(value)
            raise WireError(f"a {cls.__name__} with the fields {sorted(checks)} was expected, got {got}")
        fields = {}
        for name, take in checks.items():
            try:
                fields[name] = take(value[name])
            except WireError as error:
                raise WireError(f"{name}: {error}") from None
        return cls(**fields)

    return check


def _seconds_by_phase(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > MAX_SPANS:
        raise WireError(f"an object of at most {MAX_SPANS} phases and their seconds was expected, got {show(value)}")
    return {text(phase): real(seconds) for phase, seconds in value.items()}


def _share(value: Any) -> float:
    if real(value) > 1:
        raise WireError(f"a share from 0 to 1 was expected, got {show(value)}")
    return real(value)


_SPANS = many(_mapping(Span, phase=text, start_s=real, end_s=real), MAX_SPANS)
_SOURCE = _mapping(
    SourceReport,
    rank=uint(MAX_SOURCES),
    pack_s=real,
    dense_bytes=uint(),
    delta_bytes=uint(),
    changed_elements=optional(uint()),
    num_chunks=uint(MAX_CHUNKS),
)
_ENGINE = _mapping(
    EngineReport,
    engine=text,
    state=text,
    stage_s=real,
    pause_s=real,
    num_bytes=uint(),
    checksums_checked=uint(),
    spans=_SPANS,
    reason=text,
    transport=text,
    num_repeats=uint(),
    asked_bytes=uint(),
)
_REPORT = _mapping(
    PublishReport,
    version=_mapping(Version, epoch=uint(), number=uint()),
    num_bytes=uint(),
    num_tensors=uint(),
    num_chunks=uint(),
    phases_s=_seconds_by_phase,
    spans=_SPANS,
    dense_bytes=uint(),
    density=optional(_share),
    sources=many(_SOURCE, MAX_SOURCES),
    engines=many(_ENGINE, MAX_ENGINES),
    delta=choice(*DELTA_MODES),
    why=text,
)
