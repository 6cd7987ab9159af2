"""Folders that are made once and kept: whole or absent, whoever else makes the same one.

folder = make_once(cache_dir / key, write)  # write(folder) fills an empty folder
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from weightcast.sync.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "config.json",
    "chat_template.jinja",
)


def make_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` if it is not there yet. Any number of processes may call it."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        write(work)
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.is_dir():  # another process may have put the same folder there first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def key_of(*parts: str) -> str:
    """A folder's name, for what it is made from."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """The sum of a file. Raises `ConfigError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def tokenizer_sha256(folder: str) -> str:
    """A hash of the files that decide how text becomes tokens; of the hub id where `folder` is not a folder."""
    names = [name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    sums = [f"{name} {file_sha256(Path(folder) / name)}" for name in names]
    return hashlib.sha256("\n".join(sums or [folder]).encode()).hexdigest()
