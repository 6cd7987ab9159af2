"""Where a source of this host hands out its memory: a socket behind a path that strangers can neither name nor take.

    check_door(path)                                        # WireError: a ticket's path that is none of ours
    connection = knock(path, host, owners, timeout_s)       # ReachError says why nobody answers, and the remedy

A ticket names the path and the boot of the machine, so that an engine elsewhere is told that it is elsewhere.
"""

import os
from pathlib import Path

from weightcast.sync import schema
from weightcast.sync.errors import DeadlineExceeded, ReachError, WireError
from weightcast.sync.host import folders
from weightcast.sync.host.packets import Connection, connect

TOKEN_BYTES = 32


def check_door(path: str) -> Path:
    """The path of a source's socket, or `WireError` when it cannot be one that `folders` made."""
    read = Path(path)
    is_plain = read.is_absolute() and ".." not in read.parts and read.name == folders.SOCKET_NAME
    if not is_plain or not read.parent.name.startswith(folders.PREFIX):
        raise WireError(f"{schema.show(path)} is no path of a source's socket")
    if len(os.fsencode(read)) > folders.MAX_PATH_BYTES:
        raise WireError(f"{schema.show(path)} is no path of a source's socket")
    return read


def knock(path: Path, host: str, owners: frozenset[int], timeout_s: float) -> Connection:
    """A connection to the source of one of the users `owners` behind `path`; `ReachError` when there is none."""
    try:
        folders.check_folder(path.parent, owners)
        return connect(path, owners, timeout_s)
    except FileNotFoundError:
        if host != host_name():
            reason = "it is on another host; use a transport that goes over the network"
        else:
            reason = "the source ended, or lives in a container whose folder for sockets is not mounted here"
    except PermissionError:
        reason = f"it belongs to another user; run both as one, or let the source allow the uid {os.geteuid()}"
    except ConnectionRefusedError:
        reason = "the source ended without closing it; get a new ticket"
    except DeadlineExceeded as error:
        reason = str(error)
    raise ReachError(f"no memory to reach at {path}: {reason}")


def host_name() -> str:
    """A name for this machine until it boots again; only messages depend on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def remove_own_folder(folder: Path, pid: int) -> None:
    """Remove a door's folder; not in a forked child, whose parent still uses it."""
    if os.getpid() == pid:
        folders.remove_socket_folder(folder)
