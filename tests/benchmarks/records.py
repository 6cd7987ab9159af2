"""The words of the benchmark: a case and what it must reach, a reading of it, and the record that is written down.

Case("delta_apply_gbps", "GB/s of dense bytes, one core", at_least(10), measure_apply, "memcpy")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

Status = Literal["ok", "failed", "not run"]
# How a case's figure comes from its two medians.
RATIOS: dict[str, Callable[[float, float], float]] = {
    "value / baseline": lambda value, baseline: value / baseline,
    "baseline / value": lambda value, baseline: baseline / value,
    "value": lambda value, baseline: value,
}


class CaseError(Exception):
    """A case that could not be measured, or whose bits were wrong; the record says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the figure must reach."""

    limit: float
    is_floor: bool

    def is_reached(self, ratio: float) -> bool:
        """Whether `ratio` keeps the limit."""
        return ratio >= self.limit if self.is_floor else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'at least' if self.is_floor else 'at most'} {self.limit:g}"


def at_least(limit: float) -> Target:
    """More is better."""
    return Target(limit, is_floor=True)


def at_most(limit: float) -> Target:
    """Less is better."""
    return Target(limit, is_floor=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure: `rounds` that count (one more comes before, to warm up); `quick` is to try the program."""

    rounds: int
    quick: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """What a case measured: one value a round and one of its baseline, in the same unit, taken in turns.

    `details` are further figures that a plot or a reader may want, by name.
    """

    values: Sequence[float]
    baseline_values: Sequence[float]
    unit: str
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    """How many rounds the values are of, where a case gives medians only; otherwise there is a value a round."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. `needs` names what a machine must have for it: see `machine.MISSING`."""

    name: str
    figure: str
    target: Target | None
    measure: Callable[[Settings], Reading]
    baseline: str
    ratio: str = "value / baseline"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the results: medians in `unit`, and `ratio`, the case's figure, made of the two as `figure` says.

    `measured_at` (UTC) and `commit` say when and of what; a record may be older than its file.
    """

    case: str
    figure: str
    status: Status
    value: float | None
    unit: str
    baseline: str
    baseline_value: float | None
    ratio: float | None
    rounds: int
    target: str
    reached: bool | None
    note: str
    measured_at: str
    commit: str
    values: list[float] = field(default_factory=list)
    baseline_values: list[float] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)


def make_record(case: Case, reading: Reading, measured_at: str, commit: str) -> Record:
    """The record of a case that was measured."""
    value, baseline_value = median(reading.values), median(reading.baseline_values)
    ratio = RATIOS[case.ratio](value, baseline_value)
    return Record(
        case=case.name,
        figure=case.figure,
        status="ok",
        value=value,
        unit=reading.unit,
        baseline=case.baseline,
        baseline_value=baseline_value,
        ratio=ratio,
        rounds=reading.rounds or len(reading.values),
        target=str(case.target) if case.target else "",
        reached=case.target.is_reached(ratio) if case.target else None,
        note=reading.note,
        measured_at=measured_at,
        commit=commit,
        values=list(reading.values),
        baseline_values=list(reading.baseline_values),
        details=dict(reading.details),
    )


def make_empty_record(case: Case, status: Status, note: str, measured_at: str, commit: str) -> Record:
    """The record of a case that failed or could not run here, and why. A target that was not measured is missed."""
    target = str(case.target) if case.target else ""
    reached = False if case.target and status == "failed" else None
    return Record(
        case.name,
        case.figure,
        status,
        None,
        "",
        case.baseline,
        None,
        None,
        0,
        target,
        reached,
        note,
        measured_at,
        commit,
    )


def read_record(fields: dict[str, Any]) -> Record:
    """A record as the results file has it."""
    return Record(**fields)
