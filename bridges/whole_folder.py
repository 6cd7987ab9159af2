"""Folders that are whole or not there: written under another name beside the wanted one, and renamed at the end.

A run that dies leaves no folder that looks complete, and a write that the disk refuses is a `StorageError` that says
so. The ranks of a job must share the file system.

    partial = partial_of(folder)
    with explain_disk(folder):
        write_everything(partial)
        on_rank_zero(lambda: take_name(partial, folder), f"finishing {folder}")
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from weightcast.bridges.disk import MAKE_ROOM, is_refused
from weightcast.bridges.exchange import agreement, get_rank
from weightcast.sync.errors import ConfigError, StorageError


def partial_of(folder: Path) -> Path:
    """Where `folder` is made: a hidden sibling, since only within one file system is renaming all or nothing."""
    return folder.with_name(f".{folder.name}.partial")


def start_empty(partial: Path) -> None:
    """Make `partial` anew, without what a run that died left in it."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def take_name(partial: Path, folder: Path) -> None:
    """Rename, since that is all or nothing; an older folder steps aside first and is deleted last."""
    previous = folder.with_name(f".{folder.name}.previous")
    if previous.exists():
        shutil.rmtree(previous)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    if previous.exists():
        shutil.rmtree(previous)


def check_new(folder: Path) -> None:
    """Raise `ConfigError` unless there is no `folder`, or an empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; give a new folder for each Megatron checkpoint")


def take_new_name(partial: Path, folder: Path) -> None:
    """Rename; an empty folder of the name is replaced. Raises `ConfigError` when something came into it meanwhile."""
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise ConfigError(f"{folder} was filled while the checkpoint was written, which is in {partial}") from error


def on_rank_zero(action: Callable[[], None], what: str) -> None:
    """Run `action` on rank 0; it fails on every rank when it fails. Every rank must call it."""
    with agreement(what):
        if get_rank() == 0:
            action()


@contextmanager
def explain_disk(folder: Path, again: str = "save again") -> Iterator[None]:
    """Say what is left and what to do when the disk refuses a write into `folder` or beside it, as `StorageError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, StorageError) or not is_refused(error):
            raise
        raise StorageError(refusal(folder, str(error), again)) from error


def refusal(folder: Path, why: str, again: str = "save again") -> str:
    """The message of a `StorageError`."""
    return f"{folder} could not be written: {why}; nothing in its place looks whole: {MAKE_ROOM}, and {again}"
