"""Reads what a run wrote of itself, for `trace.py`: phases of processes, and publish reports. JSON lines, checked.

Three kinds of line are known: a phase (`{"process", "phase", "version", "start_s", "end_s"}`, as trainers and engines
write them; equal times are a moment), a publish report (`report_log.py`), and figures without a time (`{"event": …}`),
which a trace cannot show and which are counted. Anything else is refused with its file and line.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.report import PublishReport
from weightcast.sync.report_log import is_report, parse_report
from weightcast.sync.schema import optional, real, show, text, uint

Scalar: TypeAlias = str | int | float | bool
_PHASE_FIELDS = ("process", "phase", "version", "epoch", "start_s", "end_s")


@dataclass(frozen=True, slots=True)
class Phase:
    """One process at work on one version, or a moment of it; times are seconds since 1970.

    `version` and `epoch` are None where the line does not say. `args` are further figures, shown with the phase.
    """

    process: str
    name: str
    version: int | None
    epoch: int | None
    start_s: float
    end_s: float
    args: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recording:
    """All that was read. `num_figures` lines had no time; `num_unfinished` files end in a line still being written."""

    phases: tuple[Phase, ...]
    reports: tuple[PublishReport, ...]
    num_figures: int = 0
    num_unfinished: int = 0


def read_recording(paths: Sequence[Path]) -> Recording:
    """What the files say, in order; of a folder, every file of it with `.jsonl` in its name.

    Raises `ConfigError` with the file and line of the first that is not understood, for a file that cannot be read,
    and for a folder that has none.
    """
    phases: list[Phase] = []
    reports: list[PublishReport] = []
    num_figures = num_unfinished = 0
    for path in _list_files(paths):
        for line in _read_lines(path):
            if isinstance(line, Phase):
                phases.append(line)
            elif isinstance(line, PublishReport):
                reports.append(line)
            elif line is UNFINISHED:
                num_unfinished += 1
            else:
                num_figures += 1
    return Recording(tuple(phases), tuple(reports), num_figures, num_unfinished)


FIGURES, UNFINISHED = "figures", "unfinished"
Line: TypeAlias = Phase | PublishReport | str


def _list_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        files = sorted(file for file in path.glob("*.jsonl*") if file.is_file())
        if not files:
            raise ConfigError(
                f"{path} has no files with .jsonl in their names; name a run's folder of events, or files"
            )
        yield from files


def _read_lines(path: Path) -> Iterator[Line]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield parse_line(line)
                except ValueError as error:
                    if not line.endswith(b"\n"):  # a run that is going on, or was killed while it wrote
                        yield UNFINISHED
                        return
                    raise ConfigError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}; name event files of a run, or their folder") from error


def parse_line(line: str | bytes) -> Line:
    """A phase, a report, or `FIGURES` for figures without a time. Raises `ValueError` for anything else."""
    try:
        fields = json.loads(line)
    except RecursionError:
        raise WireError("JSON that is nested too deeply") from None
    if is_report(fields):
        return parse_report(fields)
    if isinstance(fields, dict) and "phase" in fields:
        return _parse_phase(fields)
    if isinstance(fields, dict) and isinstance(fields.get("event"), str):
        return FIGURES
    raise WireError(
        f"an object with a 'phase', an 'event', or a publish report's 'format' was expected, got {show(fields)}"
    )


def _parse_phase(fields: dict[str, Any]) -> Phase:
    checks = {
        "process": text,
        "phase": text,
        "version": optional(uint()),
        "epoch": optional(uint()),
        "start_s": real,
        "end_s": real,
    }
    found: dict[str, Any] = {}
    for name, take in checks.items():
        if name not in fields and name not in ("version", "epoch"):
            raise WireError(f"a phase without {name!r}; a phase has {', '.join(_PHASE_FIELDS)}")
        try:
            found[name] = take(fields.get(name))
        except WireError as error:
            raise WireError(f"{name}: {error}") from None
    if found["end_s"] < found["start_s"]:
        raise WireError(f"a phase that ends at {found['end_s']} before it starts at {found['start_s']}")
    args = {name: value for name, value in fields.items() if name not in checks and _is_scalar(value)}
    return Phase(
        found["process"], found["phase"], found["version"], found["epoch"], found["start_s"], found["end_s"], args
    )


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float | bool)
