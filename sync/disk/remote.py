"""Versions in object stores and wherever else fsspec reaches: `s3://`, `gs://`, `abfs://`, `sftp://`, `memory://`, ...

Such stores have neither rename nor fsync. They need none: a data file means nothing before a manifest names it, and a
manifest that was cut short is seen to be unfinished, whether or not the store writes it in one piece. A file is read
once, block by block, into a temporary file of this host (`tempfile.gettempdir()`), and is gone when it is closed.

Needs the extra `disk-remote` (fsspec) and the package that fsspec names for the protocol (`s3fs` for `s3://`).
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO, Any

from weightcast.sync.disk.store import StoreFile, explain_writes, read_at
from weightcast.sync.disk.tensor_files import Buffer
from weightcast.sync.errors import ConfigError

_BLOCK_BYTES = 8 << 20


class FsspecStore:
    """See the module. `options` go to fsspec's filesystem (credentials, endpoint)."""

    poll_s = 1.0

    def __init__(self, url: str, **options: Any) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ConfigError(
                f"{url} is reached by fsspec, which is not installed: pip install 'weightcast[disk-remote]'"
            ) from error
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:  # a protocol whose package is missing, or that there is not
            raise ConfigError(f"{url} cannot be reached by fsspec: {error}") from error
        self.url = url

    def _path(self, *names: str) -> str:
        return "/".join((self._root.rstrip("/"), *names))

    def _list(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            entries: list[dict[str, Any]] = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")]

    def folders(self) -> list[str]:
        """See `Store`."""
        found = self._list(self._path())
        return [_last_name(entry) for entry in found if entry["type"] == "directory" and not entry.get("islink")]

    def files(self, folder: str) -> dict[str, int]:
        """See `Store`."""
        found = self._list(self._path(folder))
        return {
            _last_name(entry): int(entry["size"] or 0)
            for entry in found
            if entry["type"] == "file" and not entry.get("islink")
        }

    def claim(self, folder: str) -> bool:
        """See `Store`; two that claim at the very same moment may both get it, where the store cannot tell."""
        with explain_writes(f"{self.url}/{folder}"):
            if self.files(folder) or folder in self.folders():
                return False
            self._fs.makedirs(self._path(folder), exist_ok=True)
            return True

    def write(self, folder: str, name: str, buffers: Iterable[Buffer]) -> None:
        """See `Store`."""
        path = self._path(folder, name)
        with explain_writes(f"{self.url}/{folder}/{name}"):
            self._fs.makedirs(self._path(folder), exist_ok=True)
            try:
                with self._fs.open(path, "wb") as file:
                    for buffer in buffers:
                        view = memoryview(buffer)
                        for start in range(0, len(view), _BLOCK_BYTES):
                            file.write(view[start : start + _BLOCK_BYTES])
            except BaseException:
                with suppress(OSError):
                    self._fs.rm_file(path)
                raise

    def open(self, folder: str, name: str, num_bytes: int | None = None) -> StoreFile:
        """See `Store`: fetches the file."""
        path = self._path(folder, name)
        size = self._fs.info(path)["size"]
        if num_bytes is not None and size != num_bytes:
            raise OSError(errno.EINVAL, f"it has {size} bytes, {num_bytes} were expected")
        spool = tempfile.TemporaryFile(prefix="weightcast-")  # noqa: SIM115  (closed with the StoreFile)
        try:
            for start in range(0, size, _BLOCK_BYTES):
                spool.write(self._fs.cat_file(path, start=start, end=min(size, start + _BLOCK_BYTES)))
            spool.flush()
        except BaseException:
            spool.close()
            raise
        return _Fetched(spool)

    def remove(self, folder: str, names: Sequence[str]) -> None:
        """See `Store`."""
        for name in names:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(folder, name))

    def remove_folder(self, folder: str, first: str) -> None:
        """See `Store`."""
        self.remove(folder, [first])
        self.remove(folder, list(self.files(folder)))
        with suppress(OSError, NotImplementedError):  # object stores have no folders
            self._fs.rmdir(self._path(folder))

    def close(self) -> None:
        """See `Store`."""


class _Fetched:
    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self.num_bytes = os.fstat(spool.fileno()).st_size

    def read_into(self, start_byte: int, buffer: memoryview) -> int:
        return read_at(self._spool.fileno(), start_byte, buffer)

    def close(self) -> None:
        self._spool.close()


def _last_name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
