"""What a disk refuses: which errors of a write are the disk's, by the system's number. Pure."""

import errno

from safetensors import SafetensorError

from weightcast.sync.errors import StorageError

# A full disk, a quota, a limit on the size of files, a disk that is mounted for reading alone, one that fails.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
MAKE_ROOM = "make room on the disk, or give a folder on another one"


def is_refused(error: BaseException) -> bool:
    """Whether `error` is a write that the disk refused.

    torch's writer of archives gives a RuntimeError for it, which names the file of its source code, and safetensors an
    error of its own with the number of the system's.
    """
    if isinstance(error, StorageError):
        return True
    if isinstance(error, OSError):
        return error.errno in _REFUSED
    if not isinstance(error, RuntimeError | SafetensorError):
        return False
    text = str(error)
    return "inline_container" in text or any(f"(os error {number})" in text for number in _REFUSED)
