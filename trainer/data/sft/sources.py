"""Where fine-tuning records come from: files of JSON lines, or a data set of the `datasets` library.

A source says what it is made of (`digest`) before it is read, so that tokens that were made of it are found again.

    for where, record in JsonLines(Path("train.jsonl")).records(): ...
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.cache import file_sha256


class Source(Protocol):
    """Records, each with where it stands."""

    def digest(self) -> str:
        """A hash of all records."""

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """`file:line` and the record. Raises `ConfigError` for what is no record."""


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file with a JSON object in each line; empty lines are let pass."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        """The sum of the file."""
        return file_sha256(self.path)

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each line's record. Raises `ConfigError` with the line's number for one that is not a JSON object."""
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    where = f"{self.path}:{number}"
                    if line.strip():
                        yield where, _parse(line, where)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error}") from error


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    if line.lstrip().startswith(b"["):
        raise ConfigError(
            f"{where}: the start of a list, where each line is to be a JSON object, a record: write one a line, as "
            "`jq -c '.[]' file.json` does"
        )
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 (byte {error.start} of the line): mend or remove the line") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}, column {error.colno}): mend or remove the line") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: a {type(record).__name__}, not a JSON object with keys: mend or remove the line")
    return record


@dataclass(frozen=True, slots=True)
class LibrarySource:
    """One split of a data set that `datasets` loads from the hub, a folder of data files, or `save_to_disk`."""

    name: str
    split: str
    rows: Any
    """A `datasets.Dataset`."""

    def __str__(self) -> str:
        return f"{self.name}, split {self.split}"

    def digest(self) -> str:
        """A hash over all rows, read once."""
        total = hashlib.sha256()
        for row in self.rows:
            total.update(json.dumps(row, sort_keys=True, default=str).encode())
        return total.hexdigest()

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each row, with its number from 0."""
        for number, row in enumerate(self.rows):
            yield f"{self.name}, split {self.split}, row {number}", row


def load_library_splits(name: str, subset: str | None) -> dict[str, LibrarySource]:
    """All splits of the data set `name`, by the names that it gives them. Raises `ConfigError`."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("dataset.dataset_name needs the `datasets` library: pip install weightcast[data]") from error

    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, subset)
    except Exception as error:  # whatever the library, its file formats or the network raise
        raise ConfigError(f"dataset.dataset_name={name!r} cannot be loaded: {error}") from error
    splits = found if isinstance(found, dict) else {"train": found}
    return {split: LibrarySource(name, split, rows) for split, rows in splits.items()}
