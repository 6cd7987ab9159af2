"""The results files: read, renewed case by case, written.

A file holds the machine, the versions and one record a case of the table. A run of some cases keeps the records of the
others, each with its own date and commit; records of another machine are left out, and the run says so.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from records import Case, Record, read_record

HERE = Path(__file__).parent
# What makes two runs comparable.
SAME_MACHINE = ("cpu", "cores", "gpu")


@dataclass(frozen=True)
class Results:
    """One results file."""

    machine: dict[str, str | int | float]
    versions: dict[str, str]
    records: list[Record] = field(default_factory=list)

    def find(self, case: str) -> Record | None:
        """The record of a case."""
        return next((record for record in self.records if record.case == case), None)


def read_results(path: Path) -> Results | None:
    """The file's content, or None where there is no file."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    records = [read_record(fields) for fields in content["records"]]
    return Results(content["machine"], content["versions"], records)


def write_results(path: Path, results: Results) -> None:
    """Write the file anew, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": results.machine,
        "versions": results.versions,
        "records": [_round(asdict(record)) for record in results.records],
    }
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def _round(value: object) -> object:
    """Floats to six significant digits: what a clock gives beyond them is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, list) else value


def start_from(former: Results | None, machine: dict[str, str | int | float], versions: dict[str, str]) -> Results:
    """An empty file of this machine, or the former one when it is of the same machine. Pure."""
    if former is None or any(former.machine.get(key) != machine.get(key) for key in SAME_MACHINE):
        return Results(machine, versions)
    return Results(machine, versions, list(former.records))


def renew(results: Results, record: Record, table: Sequence[Case]) -> Results:
    """With this record in the place of its case's former one, in the table's order. Pure.

    A case that could not run here does not displace a record that was measured.
    """
    by_case = {former.case: former for former in results.records}
    former = by_case.get(record.case)
    if not (record.status == "not run" and former is not None and former.status == "ok"):
        by_case[record.case] = record
    return replace(results, records=[by_case[case.name] for case in table if case.name in by_case])


def describe_commit() -> str:
    """The commit that is measured, `+changes` when the tree differs from it (results and page aside)."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    ours = [f":(exclude)tests/benchmarks/{name}" for name in ("results", "plots", "README.md")]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *(f"{path}" for path in ours))
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    root = HERE.parents[1]
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def describe_time() -> str:
    """Now, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
