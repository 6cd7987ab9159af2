"""Where a source of this host hands out its memory: a socket behind a path that strangers can neither name nor take.

    door = Door(allowed_uids, base)                         # the source's: door.listener, door.token, door.path
    check_door(path)                                        # the engine's: WireError for a path that is none of ours
    connection = knock(path, host, owners, timeout_s)       # ReachError says why nobody answers, and the remedy

A ticket names the path and the boot of the machine, so that an engine elsewhere is told that it is elsewhere.
"""

import os
import secrets
import weakref
from dataclasses import dataclass
from pathlib import Path

from weightcast.sync import schema
from weightcast.sync.errors import DeadlineExceeded, ReachError, WireError
from weightcast.sync.host import folders
from weightcast.sync.host.packets import Connection, connect, listen
from weightcast.sync.schema import binary, checked

TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Open:
    """An engine's first word at a door."""

    token: bytes = checked(binary(TOKEN_BYTES))


class Door:
    """A socket in a folder of its own, and the token without which nobody is let in.

    Raises `ReachError` when there is no safe place for it. The folder goes with `remove`, with this object, or with the
    process; not in a forked child, whose parent still uses it.
    """

    def __init__(self, allowed_uids: frozenset[int], base: Path | None) -> None:
        self.uids = allowed_uids | {os.geteuid()}
        # Others of the allowed users must get through the folder; that its name is no secret does no harm.
        is_private = allowed_uids <= {os.geteuid()}
        folder = folders.make_socket_folder(base, mode=0o700 if is_private else 0o711)
        self._remove = weakref.finalize(self, _remove_own_folder, folder, os.getpid())
        self.path = folder / folders.SOCKET_NAME
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.listener = listen(self.path, mode=0o600 if is_private else 0o666)

    def remove(self) -> None:
        """Take the socket away; whoever is connected stays so."""
        self._remove()


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


def _remove_own_folder(folder: Path, pid: int) -> None:
    """Remove a door's folder; not in a forked child, whose parent still uses it."""
    if os.getpid() == pid:
        folders.remove_socket_folder(folder)
