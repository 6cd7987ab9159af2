"""Where the bytes of one stored tensor lie in a `.distcp` file, so that a part of it can be read by itself.

torch.distributed.checkpoint writes each chunk of a tensor as a small zip archive of its own, one after the other in a
file; the tensor's bytes are one uncompressed member of it. torch reads a chunk as a whole, which for an embedding is
gigabytes. Here only the member's place is looked up, and the description beside it (a pickle) is scanned for the
tensor's shape and strides without being executed.

    place = find_data(path, offset=0, length=17961, spec=TensorSpec("embedding.weight", torch.bfloat16, (256, 32)))
"""

import io
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO

from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import TensorSpec

_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and its extra field
_LENGTHS_AT = 26  # where in it the lengths of those two are


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, base + place)
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        room = max(0, self._length - self._place)
        wanted = room if size < 0 else min(size, room)
        self._file.seek(self._offset + self._place)
        data = self._file.read(wanted)
        self._place += len(data)
        return data


def find_data(path: Path, offset: int, length: int, spec: TensorSpec) -> int:
    """The byte of `path` at which the values of a chunk begin, row by row; `offset` and `length` are its archive's.

    `spec` has the chunk's shape. Raises `CheckpointMismatch` when the archive is damaged or holds something else.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(_Window(file, offset, length)) as archive:
                members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                data, order = members["data/0"], archive.read(members["byteorder"])
                numbers = _read_numbers(archive.read(members["data.pkl"]))
                file.seek(offset + data.header_offset)
                header = file.read(_LOCAL_HEADER_BYTES)
                name_bytes, extra_bytes = struct.unpack_from("<HH", header, _LENGTHS_AT)
        except (zipfile.BadZipFile, KeyError, ValueError, struct.error, EOFError) as error:
            raise _damaged(path, spec, f"no archive of torch's at byte {offset}: {error!r}") from error
    expected = [0, *spec.shape, *_row_major(spec.shape)]
    if order != b"little" or data.compress_type != zipfile.ZIP_STORED or data.file_size != spec.num_bytes:
        raise _damaged(path, spec, f"{data.file_size} bytes are stored, {spec.num_bytes} expected")
    if numbers[: len(expected)] != expected:
        raise _damaged(path, spec, f"offset, shape and strides are stored as {numbers}, expected {expected}")
    return offset + data.header_offset + _LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)


def _read_numbers(description: bytes) -> list[int]:
    """The integers behind the storage in a pickled tensor: storage offset, shape, strides. Executes nothing."""
    operations = list(pickletools.genops(description))
    storage = next((index for index, (code, _, _) in enumerate(operations) if code.name == "BINPERSID"), 0)
    return [
        value
        for code, value, _ in operations[storage:]
        if isinstance(value, int) and code.name.startswith(("BININT", "LONG"))
    ]


def _row_major(shape: tuple[int, ...]) -> list[int]:
    """Strides of a contiguous tensor."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _damaged(path: Path, spec: TensorSpec, why: str) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{path}: cannot read {spec.name} {spec.shape} ({why}); the checkpoint is damaged or of another version of "
        "torch: copy it again, or load and save it with Megatron"
    )
