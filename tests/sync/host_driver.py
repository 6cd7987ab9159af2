"""A stand-in for the GPU's driver whose "device" is host memory: files in /dev/shm, named by their handles.

It is what `cuda_ipc` is tested with where there is no GPU: everything of it but the driver's own calls runs, in one
process or several.
"""

import mmap
import os
import tempfile
from pathlib import Path

import torch

from weightcast.sync.errors import ReachError
from weightcast.sync.transports.cuda_driver import HANDLE_BYTES, DeviceMemory

UUID = bytes(range(16))


class HostDriver:
    """See the module. `freed` and `closed` count what was given back; with `torn` others open zeros."""

    def __init__(self, uuid: bytes = UUID) -> None:
        self.freed = 0
        self.closed = 0
        self.torn = False
        self.refuses = False
        self._uuid = uuid

    def devices(self) -> dict[bytes, torch.device]:
        return {self._uuid: torch.device("cpu")}

    def allocate(self, num_bytes: int, device: torch.device) -> DeviceMemory:
        descriptor, name = tempfile.mkstemp(prefix="wc-", dir="/dev/shm")
        os.ftruncate(descriptor, num_bytes)
        tensor = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        os.close(descriptor)

        def free() -> None:
            Path(name).unlink()
            self.freed += 1

        return DeviceMemory(tensor, name.encode().ljust(HANDLE_BYTES, b"\0"), free)

    def open(self, handle: bytes, num_bytes: int, device: torch.device) -> DeviceMemory:
        path = Path(handle.rstrip(b"\0").decode())
        if self.refuses or not path.exists() or path.stat().st_size < num_bytes:
            raise ReachError("the source's memory on cpu cannot be opened: error 201, invalid device context")
        with path.open("r+b") as file:
            tensor = torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8)
        if self.torn:
            tensor = torch.zeros_like(tensor)

        def close() -> None:
            self.closed += 1

        return DeviceMemory(tensor, handle, close)
