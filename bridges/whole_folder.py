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

from weightcast.bridges.exchange import agreement, get_rank
from weightcast.sync.errors import ConfigError, StorageError

# A full disk, a quota, a limit on the size of files, a disk that is mounted for reading alone, one that fails.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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
    """Say what is left and what to do when a write into `folder` or beside it fails, as `StorageError`.

    torch's writer of archives gives a RuntimeError for it, which names the file of its source code, and safetensors an
    error of its own with the number of the system's.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_refused(error):
            raise
        raise StorageError(refusal(folder, str(error), again)) from error


def refusal(folder: Path, why: str, again: str = "save again") -> str:
    """The message of a `StorageError`."""
    return (
        f"{folder} could not be written: {why}; nothing in its place looks whole: make room on the disk, or give "
        f"a folder on another one, and {again}"
    )


def _is_refused(error: OSError | RuntimeError | SafetensorError) -> bool:
    if isinstance(error, StorageError):
        return False
    if isinstance(error, OSError):
        return error.errno in _REFUSED
    text = str(error)
    return "inline_container" in text or any(f"(os error {number})" in text for number in _REFUSED)
