"""Which text is trained on.

By default that is text which every Python carries, its own standard library, so that training needs no download;
`dataset.files` names the user's own.

    files = choose_files(cfg.dataset)
"""

import sysconfig
from pathlib import Path

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import DatasetConfig


def choose_files(dataset: DatasetConfig) -> list[Path]:
    """The files that the configuration names, or else the standard library's up to `max_bytes`."""
    if dataset.files:
        return [Path(name) for name in dataset.files]
    return stdlib_text_files(dataset.max_bytes)


def stdlib_text_files(max_bytes: int) -> list[Path]:
    """Top-level modules of this Python's standard library, by name, up to `max_bytes` bytes of text in total.

    The same list on every run of one Python. Raises `ConfigError` when the library is not there as files (a zip),
    or when not even one file fits.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    chosen: list[Path] = []
    room = max_bytes
    for path in sorted(folder.glob("*.py")):
        size = path.stat().st_size
        if size == 0:
            continue
        if size > room:
            break
        chosen.append(path)
        room -= size
    if not chosen:
        raise ConfigError(
            f"no text: Python's standard library in {folder} gives no file of at most dataset.max_bytes={max_bytes} "
            f"bytes; name your own text with dataset.files=[a.txt]"
        )
    return chosen


def read_document(path: Path) -> str:
    """One file's text. Raises `ConfigError` when it cannot be read, is not UTF-8, or holds nothing but spaces."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path} holds no text: leave it out of dataset.files, or give a file with text")
    return text
