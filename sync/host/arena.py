"""Arenas: anonymous memory that one process writes and others of its host may read.

    arena = Arena(num_bytes)                    # arena.memory is written here
    mapped = map_arena(descriptor, num_bytes)   # elsewhere, with a copy of arena.descriptor: read-only

An arena has no name, so nobody can find, replace or forget it: it ends with the last process that has it open,
however that process ends. It is sealed: its size is fixed, and no second writable mapping of it can be made, not even
by whoever opens its descriptor again.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import time
import weakref

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.errors import ReachError, StorageError

MAX_ARENA_BYTES = 1 << 48
# Linux 5.1; Python's fcntl does not have it.
_F_SEAL_FUTURE_WRITE = 0x0010
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# Linux 5.14: map all pages now. Faults one by one made the first pass over mapped memory 3 to 4 times slower here.
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_POPULATE_BYTES = 256 << 20


class Arena:
    """`memory` is this process's, writable and page-aligned; `descriptor` is read-only, to be sent to others."""

    def __init__(self, num_bytes: int) -> None:
        assert 0 < num_bytes <= MAX_ARENA_BYTES
        if not hasattr(os, "memfd_create"):
            raise ReachError("shared memory needs Linux; use another transport")
        writable = os.memfd_create("weightcast", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            mapping = _take_memory(writable, num_bytes)
            seals = _SIZE_SEALS | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, seals)
            self.descriptor = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(writable)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        # The array keeps the mapping: it is unmapped when nobody looks at it any more.
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)

    def close(self) -> None:
        """Give nobody else access; the memory stays for those who have it."""
        self._close()


def _take_memory(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Map the memory with all of its pages: where there is too little, that shows now and not amid a version."""
    try:
        os.ftruncate(descriptor, num_bytes)
        mapping = mmap.mmap(descriptor, num_bytes)
        with contextlib.suppress(OSError):  # pages of 2 MiB, where the host's settings allow them on request
            mapping.madvise(mmap.MADV_HUGEPAGE)
        if not _populate(mapping, _MADV_POPULATE_WRITE, None):
            os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        raise StorageError(
            error.errno, f"no {num_bytes} bytes of memory for the weights: {error.strerror}; free some, or share less"
        ) from None
    return mapping


def _populate(mapping: mmap.mmap, advice: int, deadline_s: float | None) -> bool:
    """Map pages until the deadline (monotonic), the rest when they are touched; False where the kernel cannot."""
    for start in range(0, len(mapping), _POPULATE_BYTES):
        if deadline_s is not None and time.monotonic() >= deadline_s:
            break
        try:
            mapping.madvise(advice, start, min(_POPULATE_BYTES, len(mapping) - start))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
    return True


def populate(mapping: mmap.mmap, deadline_s: float) -> None:
    """Map the pages of what is read, until the deadline (monotonic). `OSError`."""
    _populate(mapping, _MADV_POPULATE_READ, deadline_s)


def map_arena(descriptor: int, num_bytes: int, timeout_s: float) -> npt.NDArray[np.uint8]:
    """The arena behind `descriptor` as a read-only array; `descriptor` is not needed afterwards.

    Its pages are mapped now, for at most `timeout_s`, rather than one by one in the first pass over them. `ReachError`
    unless it is an arena of just `num_bytes`, whose size is sealed: a file that shrank would kill the reader.
    """
    deadline_s = time.monotonic() + timeout_s
    info = os.fstat(descriptor)
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not stat.S_ISREG(info.st_mode) or seals & _SIZE_SEALS != _SIZE_SEALS:
        raise ReachError("what was handed over is no sealed memory; it is not used")
    if info.st_size != num_bytes:
        raise ReachError(f"the memory that was handed over has {info.st_size} bytes, {num_bytes} were expected")
    mapping = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
        populate(mapping, deadline_s)
    return np.frombuffer(mapping, np.uint8)


def as_tensor(memory: npt.NDArray[np.uint8]) -> torch.Tensor:
    """An array as a tensor of bytes on the same memory, which it keeps.

    torch knows no read-only tensors (and warns of such arrays). One on a mapped arena must never be written: the
    processor refuses, and the process ends with SIGSEGV.
    """
    view = (ctypes.c_uint8 * len(memory)).from_address(memory.ctypes.data)
    view.memory = memory  # type: ignore[attr-defined]  # the tensor keeps the view, the view the array
    return torch.frombuffer(view, dtype=torch.uint8)
