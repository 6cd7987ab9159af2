"""A stand-in for the GPU's driver whose "device" is host memory: files in /dev/shm, named by their handles.

It is what `cuda_ipc` is tested with where there is no GPU: everything of it but the driver's own calls runs, in one
process or several.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from weightcast.sync.errors import ReachError
from weightcast.sync.transports.cuda_driver import HANDLE_BYTES, Allocation, DeviceMemory

UUID = bytes(range(16))


class HostDriver:
    """See the module. `freed` and `closed` count what was given back; with `torn` others open zeros."""

    def __init__(self, uuid: bytes = UUID) -> None:
        self.freed = 0
        self.closed = 0
        self.torn = False
        self.refuses = False
        self.shared = 0
        self._uuid = uuid
        self._taken: dict[str, torch.Tensor] = {}
        # Memory that stands for a trainer's is given back by nobody: its files go with this object.
        weakref.finalize(self, _remove, self._taken)

    def devices(self) -> dict[bytes, torch.device]:
        return {self._uuid: torch.device("cpu")}

    def allocate(self, num_bytes: int, device: torch.device) -> DeviceMemory:
        descriptor, name = tempfile.mkstemp(prefix="wc-", dir="/dev/shm")
        os.ftruncate(descriptor, num_bytes)
        tensor = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        os.close(descriptor)

        self._taken[name] = tensor

        def free() -> None:
            Path(name).unlink()
            del self._taken[name]
            self.freed += 1

        return DeviceMemory(tensor, name.encode().ljust(HANDLE_BYTES, b"\0"), free)

    def share(self, address: int, device: torch.device) -> Allocation:
        """Of what this driver handed out; other memory of the process is as that of expandable segments."""
        for name, tensor in self._taken.items():
            start = tensor.data_ptr()
            if start <= address < start + len(tensor):
                self.shared += 1
                return Allocation(start, len(tensor), name.encode().ljust(HANDLE_BYTES, b"\0"))
        raise ReachError("memory that torch's allocator took on cpu cannot be shared: error 1, invalid argument")

    def move_in(self, tensors: Mapping[str, torch.Tensor], gap_bytes: int = 64) -> dict[str, torch.Tensor]:
        """Copies of tensors in one allocation of this driver, as torch's allocator would have placed them."""
        starts, end = [], 0
        for tensor in tensors.values():
            starts.append(end)
            end += -(-tensor.nbytes // gap_bytes) * gap_bytes
        memory = self.allocate(max(end, 1), torch.device("cpu")).tensor
        moved = {}
        for start, (name, tensor) in zip(starts, tensors.items(), strict=True):
            moved[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return moved

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


def _remove(taken: dict[str, torch.Tensor]) -> None:
    for name in taken:
        Path(name).unlink(missing_ok=True)
