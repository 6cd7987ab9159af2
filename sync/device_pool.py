"""Memory on a device for a staged version, reused from version to version as `shadow.BufferPool` reuses the host's.

pool = DevicePool(torch.device("cuda", 0))
tensor = pool.take(spec, keep_bits=True)
"""

import weakref
from typing import Any

import numpy as np
import torch

from weightcast.sync.regions import TensorSpec


class _Lease:
    """A buffer as torch takes it in: every tensor on it keeps the lease alive, and a dead lease means free memory."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.__cuda_array_interface__ = {
            "shape": tuple(buffer.shape),
            "typestr": "|u1",
            "data": (buffer.data_ptr(), False),
            "version": 3,
        }


class DevicePool:
    """A `TensorPool` on `device`: buffers by tensor name. On a CPU, for tests, numpy's arrays are the leases."""

    def __init__(self, device: torch.device) -> None:
        is_any = device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_any else device
        self._buffers: dict[str, torch.Tensor] = {}
        self._leases: dict[str, weakref.ref[Any]] = {}

    def take(self, spec: TensorSpec, *, keep_bits: bool = False) -> torch.Tensor:
        """A tensor for `spec` on memory that nobody else looks at; see `TensorPool`. `MemoryError` without room."""
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        buffer = self._buffers.get(spec.name)
        if buffer is None or buffer.numel() != spec.num_bytes or self._leases[spec.name]() is not None:
            try:
                fresh = torch.empty(spec.num_bytes, dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError as error:
                raise MemoryError(str(error)) from None
            if keep_bits and buffer is not None:
                fresh.copy_(buffer)
            self._buffers[spec.name] = buffer = fresh
        lease = self._lease(buffer)
        self._leases[spec.name] = weakref.ref(lease)
        tensor = torch.as_tensor(lease, device=self.device)
        assert tensor.data_ptr() == buffer.data_ptr(), "a lease is taken in as it is, without a copy"
        return tensor.view(spec.dtype).view(spec.shape)

    def _lease(self, buffer: torch.Tensor) -> Any:
        if self.device.type == "cuda":
            return _Lease(buffer)
        array: np.ndarray[Any, Any] = buffer.numpy().view()
        return array
