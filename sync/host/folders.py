"""Folders for the sockets of one user's processes: where strangers can neither look nor put anything first.

    folder = make_socket_folder()             # new, with a name of chance; for one process
    folder = shared_folder()                  # the same for all processes of this user

They lie in `XDG_RUNTIME_DIR` where that is set, else in the folder for temporary files. What is there already is
believed only when it belongs to this user, is a real folder, and nobody else can write to it.
"""

import contextlib
import errno
import os
import socket
import stat
import tempfile
import time
from pathlib import Path

from weightcast.sync.errors import ReachError

PREFIX = "weightcast-"
SOCKET_NAME = "socket"
# Behind the name of a socket that does not listen yet.
UNFINISHED = ".new"
# The longest path that the kernel takes for a Unix socket.
MAX_PATH_BYTES = 107
# A folder without a socket is younger than this while its owner is about to bind.
_BINDING_S = 60.0


def runtime_folder() -> Path:
    """Where this user's sockets belong. `ReachError` when another user could replace what lies there."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    try:
        info = base.stat()
    except OSError as error:
        raise ReachError(f"no folder for sockets at {base}: {error.strerror}; set XDG_RUNTIME_DIR to one") from None
    others_write = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if info.st_uid not in (0, os.geteuid()) or (others_write and not info.st_mode & stat.S_ISVTX):
        raise ReachError(
            f"other users may replace what lies in {base} (mode {stat.S_IMODE(info.st_mode):o}, uid {info.st_uid}); "
            "set XDG_RUNTIME_DIR to a folder that only you can write to"
        )
    return base


def make_socket_folder(base: Path | None = None, *, mode: int = 0o700) -> Path:
    """A new folder for the socket of this process; those that killed processes of this user left are removed."""
    base = base if base is not None else runtime_folder()
    sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    folder.chmod(mode)
    if len(os.fsencode(folder / (SOCKET_NAME + UNFINISHED))) > MAX_PATH_BYTES:
        folder.rmdir()
        raise ReachError(
            f"the path of a socket in {base} is longer than {MAX_PATH_BYTES} bytes; "
            "set XDG_RUNTIME_DIR to a shorter one"
        )
    return folder


def remove_socket_folder(folder: Path) -> None:
    """Remove such a folder and the socket in it; nothing happens when it is gone."""
    for name in (SOCKET_NAME, SOCKET_NAME + UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()


def shared_folder(base: Path | None = None) -> Path:
    """The one folder of this user's processes. `ReachError` when somebody else made it, or can write to it."""
    base = base if base is not None else runtime_folder()
    folder = base / f"{PREFIX}{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_folder(folder, frozenset({os.geteuid()}))
    return folder


def check_folder(folder: Path, owners: frozenset[int]) -> None:
    """`ReachError` unless `folder` is a real folder that one of the uids `owners` has for itself.

    `FileNotFoundError` and `PermissionError` pass through.
    """
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise ReachError(f"{folder} is not a folder but something else, a link perhaps; remove it")
    if info.st_uid not in owners:
        raise ReachError(
            f"{folder} belongs to the user {info.st_uid}, not to {sorted(owners)}: somebody else made it; "
            "set XDG_RUNTIME_DIR to a folder that only you can write to, or list the user among the allowed ones"
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ReachError(f"other users can write to {folder} (mode {stat.S_IMODE(info.st_mode):o}); remove it")


def sweep(base: Path) -> None:
    """Remove this user's folders in `base` whose owners are dead: nobody listens on their sockets any more."""
    for entry in os.scandir(base):
        folder = Path(entry.path)
        try:
            info = entry.stat(follow_symlinks=False)
            ours = entry.name.startswith(PREFIX) and stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
            if ours and folder != base / f"{PREFIX}{os.geteuid()}" and _is_abandoned(folder, info.st_mtime):
                remove_socket_folder(folder)
        except OSError:
            continue  # swept by another process meanwhile, or not for us to sweep


def _is_abandoned(folder: Path, changed_s: float) -> bool:
    """Pids do not say it: a container has pids of its own, and may share the folder for temporary files."""
    path = folder / SOCKET_NAME
    if not path.exists():
        return time.time() - changed_s > _BINDING_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
