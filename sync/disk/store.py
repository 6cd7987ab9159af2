"""Where versions lie: a folder of this host's file systems, or anything that fsspec reaches.

A store is flat: folders of files. A write is whole or not there, and durable when it returns; nothing is ever
altered. On a file system that means a temporary file, fsync, rename, fsync of the folder, in this order. Folders and
files are reached by descriptor, and links are not followed, so that a stranger's link leads nowhere.

    store = open_store("/shared/versions")          # or "s3://bucket/versions"
    store.write("1764150000000-00000001", "delta-r00000-00000.safetensors", [header, data])
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from weightcast.sync.disk.tensor_files import Buffer
from weightcast.sync.errors import StorageError

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not to hang on a stranger's named pipe
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_TEMPORARY = ".tmp-"


# Of the network, of this host, or of its temporary folder: no fault of the file, and worth another look.
_PASSING = frozenset(
    (
        *(errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETDOWN),
        *(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOSPC, errno.ENOMEM, errno.EMFILE),
        *(errno.ENFILE, errno.EINTR),
    )
)


class StoreFile(Protocol):
    """A file open for reading; what it holds does not change while it is open."""

    @property
    def num_bytes(self) -> int: ...

    def read_into(self, start_byte: int, buffer: memoryview) -> int:
        """Fill `buffer` from `start_byte` on; how many bytes there were, fewer only at the end of the file."""
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """See the module. Every method raises `OSError` as the system does; writes raise `StorageError`."""

    @property
    def url(self) -> str:
        """As messages name it."""
        ...

    @property
    def poll_s(self) -> float:
        """How often it may be asked for news."""
        ...

    def folders(self) -> list[str]:
        """The names of all folders; empty when there is no store yet."""
        ...

    def files(self, folder: str) -> dict[str, int]:
        """The files of a folder and their sizes; empty when there is no such folder."""
        ...

    def claim(self, folder: str) -> bool:
        """Make a new folder; False when it is there already. Raises `StorageError`."""
        ...

    def write(self, folder: str, name: str, buffers: Iterable[Buffer]) -> None:
        """Write a file, whole and durable, or not at all; an older one of that name is replaced."""
        ...

    def open(self, folder: str, name: str, num_bytes: int | None = None) -> StoreFile:
        """Open a file; fails early where it does not have the `num_bytes` that it should."""
        ...

    def remove(self, folder: str, names: Sequence[str]) -> None:
        """Remove files, in this order; what is not there is passed over."""
        ...

    def remove_folder(self, folder: str, first: str) -> None:
        """Remove a folder with its files, the file `first` before all others."""
        ...

    def close(self) -> None:
        """Let go of what was opened; a later call opens it again."""
        ...


def open_store(place: "str | os.PathLike[str] | Store") -> Store:
    """A store by its folder or URL; a store itself passes through.

    `file://` URLs are folders. Other URLs need the extra `disk-remote` and what fsspec needs for their protocol.
    """
    if not isinstance(place, str | os.PathLike):
        return place
    text = os.fspath(place)
    if text.startswith("file://"):
        return FolderStore(Path(text.removeprefix("file://")))
    if "://" in text:
        from weightcast.sync.disk.remote import FsspecStore

        return FsspecStore(text)
    return FolderStore(Path(text))


def read_file(store: Store, folder: str, name: str, max_bytes: int) -> bytes:
    """All of a small file. Raises `OSError`, `EFBIG` when it has more than `max_bytes`."""
    file = store.open(folder, name)
    try:
        if file.num_bytes > max_bytes:
            raise OSError(errno.EFBIG, f"it has {file.num_bytes} bytes, at most {max_bytes} are read")
        data = bytearray(file.num_bytes)
        got = file.read_into(0, memoryview(data))
        return bytes(data[:got])
    finally:
        file.close()


@contextmanager
def explain_writes(where: str) -> Iterator[None]:
    """Turn what the system says of a failed write into a `StorageError` that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{where} could not be written: {error.strerror or error}; every earlier version is as it was. Make room, "
            "allow the write, or give a store on another disk, and publish the next version"
        ) from error


def raise_passing(where: str, error: OSError) -> None:
    """Raise `StorageError` for an error of reading that may pass; return for one that is the file's own."""
    if error.errno in _PASSING or isinstance(error, ConnectionError | TimeoutError):
        raise StorageError(
            f"{where} cannot be read now: {error.strerror or error}; it is tried again. If it stays so, mend the "
            "network, or make room in this host's temporary folder"
        ) from error


class FolderStore:
    """A folder; it is made, with its parents, by the first write."""

    poll_s = 0.1

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._root_descriptor: int | None = None

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self.root)

    def _root(self, *, make: bool = False) -> int:
        if self._root_descriptor is None:
            if make:
                self.root.mkdir(parents=True, exist_ok=True)
            self._root_descriptor = os.open(self.root, _FOLDER)
        return self._root_descriptor

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self._root())
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def folders(self) -> list[str]:
        """See `Store`; links are not folders."""
        try:
            # A descriptor of its own: one that threads share has one place in the listing for all.
            with self._folder(".") as descriptor, os.scandir(descriptor) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def files(self, folder: str) -> dict[str, int]:
        """See `Store`; links and temporary files are none."""
        found = {}
        with suppress(FileNotFoundError), self._folder(folder) as descriptor, os.scandir(descriptor) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # renamed or removed a moment ago
                    if entry.is_file(follow_symlinks=False) and not entry.name.startswith(_TEMPORARY):
                        found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def claim(self, folder: str) -> bool:
        """See `Store`."""
        with explain_writes(f"{self.root / folder}"):
            root = self._root(make=True)
            try:
                os.mkdir(folder, dir_fd=root)
            except FileExistsError:
                return False
            os.fsync(root)
            return True

    def write(self, folder: str, name: str, buffers: Iterable[Buffer]) -> None:
        """See `Store`."""
        with explain_writes(f"{self.root / folder / name}"):
            with suppress(FileExistsError):
                os.mkdir(folder, dir_fd=self._root(make=True))
                os.fsync(self._root())
            with self._folder(folder) as descriptor:
                self._write(descriptor, name, buffers)

    def _write(self, folder: int, name: str, buffers: Iterable[Buffer]) -> None:
        temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(temporary, flags, 0o666, dir_fd=folder)
        try:
            try:
                for buffer in buffers:
                    _write_all(file, memoryview(buffer))
                os.fsync(file)
            finally:
                os.close(file)
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        os.fsync(folder)

    def open(self, folder: str, name: str, num_bytes: int | None = None) -> StoreFile:
        """See `Store`; only plain files are opened."""
        with self._folder(folder) as descriptor:
            return _OpenFile(os.open(name, _READ, dir_fd=descriptor))

    def remove(self, folder: str, names: Sequence[str]) -> None:
        """See `Store`."""
        with suppress(FileNotFoundError), self._folder(folder) as descriptor:
            for name in names:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=descriptor)
            os.fsync(descriptor)

    def remove_folder(self, folder: str, first: str) -> None:
        """See `Store`: `first` is gone for good before the next one goes."""
        self.remove(folder, [first])
        with suppress(FileNotFoundError):
            with self._folder(folder) as descriptor:
                names = os.listdir(descriptor)
            self.remove(folder, names)
            os.rmdir(folder, dir_fd=self._root())

    def close(self) -> None:
        """See `Store`."""
        if self._root_descriptor is not None:
            os.close(self._root_descriptor)
            self._root_descriptor = None


def _write_all(file: int, view: memoryview) -> None:
    view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
    while len(view):
        view = view[os.write(file, view) :]


def read_at(descriptor: int, start_byte: int, buffer: memoryview) -> int:
    """Fill `buffer` from a file; how many bytes there were (the system reads at most 2 GiB at once)."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start_byte + done)
        if count == 0:
            break
        done += count
    return done


class _OpenFile:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.num_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no plain file")

    def read_into(self, start_byte: int, buffer: memoryview) -> int:
        return read_at(self._descriptor, start_byte, buffer)

    def close(self) -> None:
        os.close(self._descriptor)
