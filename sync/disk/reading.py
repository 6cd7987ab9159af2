"""Files of a version, open and checked: no byte of one is used before its size and hash are those of the manifest.

with OpenFiles(store, manifest, hashing, numbers) as files:     # every hash was checked when this returns
    files.read_into(piece, buffer)
"""

from collections.abc import Callable, Iterable
from types import TracebackType

from weightcast.sync.disk.catalog import damage
from weightcast.sync.disk.naming import version_folder
from weightcast.sync.disk.records import Hashing, StoredFile, StoredPiece, VersionManifest
from weightcast.sync.disk.store import Store, StoreFile, raise_passing
from weightcast.sync.errors import DamagedVersion

_BLOCK_BYTES = 4 << 20


class OpenFiles:
    """See the module. `keep_going` is asked after each block, and may raise to give up."""

    def __init__(
        self,
        store: Store,
        manifest: VersionManifest,
        hashing: Hashing,
        numbers: Iterable[int],
        keep_going: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_bytes = 0
        self._store, self._manifest, self._hashing, self._keep_going = store, manifest, hashing, keep_going
        self._open: dict[int, StoreFile] = {}
        try:
            for number in numbers:
                self._open[number] = self._open_checked(manifest.files[number])
        except BaseException:
            self.close()
            raise

    @property
    def num_files(self) -> int:
        """Files whose hash was checked."""
        return len(self._open)

    def _damage(self, file: StoredFile, why: str) -> DamagedVersion:
        return damage(self._store, self._manifest.version, file.name, why)

    def _explain(self, file: StoredFile, error: OSError) -> DamagedVersion:
        raise_passing(f"{self._store.url}/{version_folder(self._manifest.version)}/{file.name}", error)
        return self._damage(file, f"the file cannot be read: {error.strerror or error}")

    def _open_checked(self, stored: StoredFile) -> StoreFile:
        try:
            file = self._store.open(version_folder(self._manifest.version), stored.name, stored.num_bytes)
        except FileNotFoundError as error:
            raise self._damage(stored, "the file is missing") from error
        except OSError as error:
            raise self._explain(stored, error) from error
        try:
            if file.num_bytes != stored.num_bytes:
                how = "cut short" if file.num_bytes < stored.num_bytes else "another"
                raise self._damage(
                    stored, f"the file is {how}: it has {file.num_bytes} bytes, {stored.num_bytes} were written"
                )
            self._check_hash(file, stored)
        except BaseException:
            file.close()
            raise
        self.num_bytes += stored.num_bytes
        return file

    def _check_hash(self, file: StoreFile, stored: StoredFile) -> None:
        hasher = self._hashing.start()
        block = memoryview(bytearray(min(_BLOCK_BYTES, stored.num_bytes)))
        for start in range(0, stored.num_bytes, _BLOCK_BYTES):
            self._keep_going()
            part = block[: min(_BLOCK_BYTES, stored.num_bytes - start)]
            self._read(file, stored, start, part)
            hasher.update(part)
        if hasher.digest() != stored.hash:
            raise self._damage(stored, f"the file was altered: it does not have the {self._hashing.name} hash it had")

    def _read(self, file: StoreFile, stored: StoredFile, start: int, buffer: memoryview) -> None:
        try:
            got = file.read_into(start, buffer)
        except OSError as error:
            raise self._explain(stored, error) from error
        if got != len(buffer):
            raise self._damage(stored, f"the file ends {len(buffer) - got} bytes early")

    def read_into(self, piece: StoredPiece, buffer: memoryview) -> None:
        """The bytes of a piece, as they lie in their file. Raises `DamagedVersion`."""
        assert len(buffer) == piece.num_bytes
        self._keep_going()
        self._read(self._open[piece.file], self._manifest.files[piece.file], piece.start_byte, buffer)

    def read_whole(self, number: int) -> bytes:
        """All of a file, which is small."""
        stored = self._manifest.files[number]
        data = bytearray(stored.num_bytes)
        self._read(self._open[number], stored, 0, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
