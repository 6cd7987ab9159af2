"""The journal of a conversion: which files are done, so that a killed run goes on where it stopped.

It lies in the folder under construction, one line of JSON a finished file behind a line that says what the conversion
is of. A line is written when its file is on disk; a line that was cut short is a file that is written again.

    journal = Journal.open(folder, about={"source": "...", "bytes": 123})
    for name in names:
        if name not in journal.done:
            journal.add(name, write(name))
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"
RESUMES = "run it again, which goes on with what is finished"
"""What to do after a conversion that the disk refused; for `explain_disk`."""


@dataclass
class Journal:
    """The finished files of a folder under construction, and a record of each; JSON's types only."""

    path: Path
    done: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(folder: Path, about: Mapping[str, Any]) -> "Journal":
        """Go on with `folder` if its journal is of the same conversion, and otherwise start it anew, empty."""
        journal = Journal(folder / JOURNAL_FILE)
        lines = _read_lines(journal.path)
        if lines and lines[0] == {"about": about}:
            journal.done = {line["file"]: line["record"] for line in lines[1:] if (folder / line["file"]).is_file()}
            journal._rewrite(lines[0])
            return journal
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        journal._append({"about": about})
        return journal

    def add(self, file: str, record: Any) -> None:
        """Note that `file` is complete and on disk."""
        self._append({"file": file, "record": record})
        self.done[file] = record

    def remove(self) -> None:
        """The conversion is whole: leave no journal behind."""
        self.path.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self, first: Mapping[str, Any]) -> None:
        """Without a last line that was cut short, behind which another could not be read."""
        lines = [first, *({"file": file, "record": record} for file, record in self.done.items())]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines))
        fresh.replace(self.path)


def mark_files(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Sizes and times of change of files, by which a journal tells whether its source is still the same."""
    stats = {str(path): path.stat() for path in sorted(set(paths))}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
