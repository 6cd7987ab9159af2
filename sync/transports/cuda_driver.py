"""Memory of a GPU that processes of one host share: taken, handed over as 64 bytes, opened. Nothing else of CUDA.

    driver = find_driver()                            # ReachError where there is no GPU
    allocation = driver.share(address, device)        # the allocation around a tensor of torch's
    memory = driver.allocate(num_bytes, device)       # memory.tensor, and memory.handle for another process
    other = driver.open(handle, num_bytes, device)    # there: other.tensor is the same memory

Why the driver's own functions, by ctypes, and not torch's `UntypedStorage._share_cuda_` and `_new_shared_cuda`:

- Those speak of blocks inside the caching allocator's segments: a handle goes with an offset, the name of a file of
  reference counters in /dev/shm that the receiver opens and writes to, and an event's handle. All of that would have to
  be believed of a message; a handle of memory that we took ourselves is 64 bytes, and the driver tells its size.
- A segment that is shared is shared whole, the trainer's other tensors in it too: `share` does that, for trainers that
  ask for it (`cuda_ipc_live`), and for nobody else.
- They are private, and have changed with `expandable_segments`, whose memory these handles cannot name.
- Memory stays until the last reader's socket is closed (`cuda_ipc`), so no counters are needed.

`libcuda.so.1` has these functions, by these names, in every release that torch runs on. Memory of our own costs no more
than a tensor of torch's, and torch sees it through `__cuda_array_interface__`. Written from the driver API's reference;
seen on one H200, between processes of one GPU (`cuda_ipc` of `make gpu-check`).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from weightcast.sync.errors import ReachError, StorageError

HANDLE_BYTES = 64
UUID_BYTES = 16
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory that somebody of this process took from the driver, and the handle by which others may open all of it."""

    address: int
    num_bytes: int
    handle: bytes


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """`tensor` is the memory, as bytes; `close` gives it back, after which nobody may look at any view of it."""

    tensor: torch.Tensor
    handle: bytes
    close: Callable[[], None]


class IpcDriver(Protocol):
    """What `cuda_ipc` needs of a driver."""

    def devices(self) -> dict[bytes, torch.device]:
        """This process's devices by the 16 bytes that name each on its host."""
        ...

    def allocate(self, num_bytes: int, device: torch.device) -> DeviceMemory:
        """Zeroed memory that others may open by its handle. `StorageError` when there is too little."""
        ...

    def share(self, address: int, device: torch.device) -> Allocation:
        """The allocation around an address of `device`, whoever took it. `ReachError` where it cannot be shared."""
        ...

    def open(self, handle: bytes, num_bytes: int, device: torch.device) -> DeviceMemory:
        """Another process's memory on this host's `device`. `ReachError` when the driver refuses."""
        ...


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _Bytes:
    """A stretch of a device's memory, as torch takes it in."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaDriver:
    """The driver of the GPUs that torch uses; see the module."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, address, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
        library.cuMemAlloc_v2.argtypes = [pointer, size]
        library.cuMemFree_v2.argtypes = [address]
        library.cuIpcGetMemHandle.argtypes = [pointer, address]
        library.cuIpcOpenMemHandle_v2.argtypes = [pointer, _Handle, ctypes.c_uint]
        library.cuIpcCloseMemHandle.argtypes = [address]
        library.cuMemGetAddressRange_v2.argtypes = [pointer, pointer, address]
        library.cuGetErrorString.argtypes = [ctypes.c_int, pointer]
        self._library = library

    def devices(self) -> dict[bytes, torch.device]:
        """See `IpcDriver`."""
        found: dict[bytes, torch.device] = {}
        for index in range(torch.cuda.device_count()):
            properties: Any = torch.cuda.get_device_properties(index)
            found[bytes(properties.uuid.bytes)] = torch.device("cuda", index)
        return found

    def allocate(self, num_bytes: int, device: torch.device) -> DeviceMemory:
        """See `IpcDriver`. Memory that torch's allocator keeps and does not use is given back first."""
        _enter(device)
        address, handle = ctypes.c_uint64(), _Handle()
        code = self._library.cuMemAlloc_v2(ctypes.byref(address), num_bytes)
        if code == _OUT_OF_MEMORY:
            torch.cuda.empty_cache()
            code = self._library.cuMemAlloc_v2(ctypes.byref(address), num_bytes)
        if code:
            raise StorageError(0, f"no {num_bytes} bytes on {device} for the weights: {self._describe(code)}")

        def free() -> None:
            _enter(device)
            self._library.cuMemFree_v2(address)

        if code := self._library.cuIpcGetMemHandle(ctypes.byref(handle), address):
            free()
            raise ReachError(f"memory of {device} cannot be shared with other processes: {self._describe(code)}")
        tensor = torch.as_tensor(_Bytes(address.value, num_bytes), device=device)
        tensor.zero_()
        torch.cuda.synchronize(device)
        return DeviceMemory(tensor, bytes(handle), free)

    def share(self, address: int, device: torch.device) -> Allocation:
        """See `IpcDriver`. Torch's allocator takes segments by cudaMalloc, which are shared as a whole.

        Those that it takes otherwise (`expandable_segments`, `cudaMallocAsync`) the driver refuses.
        """
        _enter(device)
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        code = self._library.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
        code = code or self._library.cuIpcGetMemHandle(ctypes.byref(handle), base)
        if code:
            raise ReachError(
                f"memory that torch's allocator took on {device} cannot be shared: {self._describe(code)} "
                "(expandable_segments and cudaMallocAsync cannot be, see PYTORCH_CUDA_ALLOC_CONF)"
            )
        return Allocation(base.value, size.value, bytes(handle))

    def open(self, handle: bytes, num_bytes: int, device: torch.device) -> DeviceMemory:
        """See `IpcDriver`. A handle that is not of another process of this host is refused by the driver itself."""
        assert len(handle) == HANDLE_BYTES
        _enter(device)
        address = ctypes.c_uint64()
        code = self._library.cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
        )
        if code:
            raise ReachError(f"the source's memory on {device} cannot be opened: {self._describe(code)}")

        def close() -> None:
            _enter(device)
            self._library.cuIpcCloseMemHandle(address)

        try:
            self._check_size(address, num_bytes, device)
        except ReachError:
            close()
            raise
        return DeviceMemory(torch.as_tensor(_Bytes(address.value, num_bytes), device=device), handle, close)

    def _check_size(self, address: ctypes.c_uint64, num_bytes: int, device: torch.device) -> None:
        """A read past its end would end this process's use of the GPU."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        code = self._library.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
        if code or base.value != address.value or size.value < num_bytes:
            raise ReachError(
                f"the memory that was handed over on {device} has {size.value} bytes, {num_bytes} were expected: "
                f"{self._describe(code)}"
            )

    def _describe(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return f"CUDA error {code}, {(text.value or b'unknown').decode()}"


def _enter(device: torch.device) -> None:
    """Make the device's primary context this thread's: the driver's functions work on the current one."""
    torch.cuda.set_device(device)
    torch.cuda.synchronize(device)


@lru_cache(maxsize=1)
def find_driver() -> IpcDriver:
    """The driver of this machine's GPUs; `ReachError` when there is none that torch can use."""
    if not torch.cuda.is_available():
        raise ReachError("CUDA IPC needs a GPU and a torch built for CUDA; use another transport")
    try:
        return CudaDriver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise ReachError(f"CUDA IPC needs the GPU's driver: {error}; use another transport") from None
