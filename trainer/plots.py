"""A run drawn from its events: loss and validation, tokens/s, and what versions cost. For `weightcast plots`.

draw_run(Path("run/events.jsonl"), Path("run.png"))
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcast.sync.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RunRecords:
    """The events of rank 0 that are drawn; a step that was trained again after a resume counts once, the last time."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    versions: list[dict[str, Any]]


def read_run(events: Path) -> RunRecords:
    """Read `<events>.0`, or the file itself. Raises `ConfigError`, with the line's number where one is broken."""
    path = events if events.is_file() else Path(f"{events}.0")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}; give the file that logger.events named") from error
    found: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}, "version": {}}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                continue  # a run that was killed, or that is writing it now
            raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
        if record.get("event") in found:
            found[record["event"]][record["step"]] = record
    if not found["step"]:
        raise ConfigError(f"{path} tells of no step: give the file that logger.events named in a run of the trainer")
    return RunRecords(*([records[step] for step in sorted(records)] for records in found.values()))


def draw_run(events: Path, out: Path) -> RunRecords:
    """Draw the run into `out` (PNG, or what its suffix says); returns what was drawn. Raises `ConfigError`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib, which is not here: pip install 'weightcast[plots]'") from error
    run = read_run(events)
    figure = Figure(figsize=(9, 9 if run.versions else 6), layout="constrained")
    axes = figure.subplots(3 if run.versions else 2, 1, sharex=True)
    _draw(axes[0], run.steps, "loss", "training")
    if run.evaluations:
        _draw(axes[0], run.evaluations, "loss", "validation", marker="o")
    _draw(axes[1], run.steps, "tokens_per_s", "tokens/s")
    if run.versions:
        _draw(axes[2], run.versions, "stall_s", "trainer held up by a version (s)", marker=".")
    axes[-1].set_xlabel("step")
    figure.savefig(out)
    return run


def _draw(axis: Any, records: list[dict[str, Any]], name: str, label: str, marker: str = "") -> None:
    points = [(record["step"], record[name]) for record in records if math.isfinite(record.get(name, math.nan))]
    axis.plot([step for step, _ in points], [value for _, value in points], label=label, marker=marker or None)
    axis.legend()
    axis.grid(alpha=0.3)
