"""Plain memcpy through shared memory: the sender copies its model into a block, then the receiver copies it out.

The shortest way between two processes of a host that anybody writes: two copies, one after the other.
"""

from collections.abc import Mapping, Sequence
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from model_state import ModelState, allocate

from baselines.meeting import Listener, Stream, dial
from baselines.sockets import as_bytes
from weightcast.sync import TensorSpec


class MemcpySender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._state = state
        self._block = SharedMemory(create=True, size=state.num_bytes)
        self._bytes = np.ndarray(state.num_bytes, np.uint8, self._block.buf)
        self._bytes[:] = 0
        self._listener = Listener("127.0.0.1")
        self.address = self._listener.address

    def connect(self) -> None:
        """Take the receiver and name the block."""
        self._stream: Stream = self._listener.accept()
        self._stream.send(self._block.name.encode())

    def send(self, number: int) -> dict[str, Any]:
        """Copy in, and say so."""
        start = 0
        for spec in self._state.specs():
            end = start + spec.num_bytes
            np.copyto(self._bytes[start:end], as_bytes(self._state.tensors[spec.name]))
            start = end
        self._stream.send(b"there")
        return {}

    def close(self) -> None:
        """End."""
        self._stream.close()
        del self._bytes
        self._block.close()
        self._block.unlink()


class MemcpyReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs)
        self._specs = specs
        self._stream = dial(address)
        self._block = SharedMemory(self._stream.receive().decode())
        self._bytes = np.ndarray(sum(spec.num_bytes for spec in specs), np.uint8, self._block.buf)

    def receive(self, number: int) -> dict[str, Any]:
        """Copy out, once it is there."""
        assert self._stream.receive() == b"there"
        start = 0
        for spec in self._specs:
            end = start + spec.num_bytes
            np.copyto(as_bytes(self.tensors[spec.name]), self._bytes[start:end])
            start = end
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        self._stream.close()
        del self._bytes
        self._block.close()


def open_sender(state: ModelState, options: Mapping[str, Any]) -> MemcpySender:
    """The trainer's side."""
    return MemcpySender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> MemcpyReceiver:
    """The engine's side."""
    return MemcpyReceiver(specs, address, options)
