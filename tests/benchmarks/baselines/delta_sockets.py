"""Others' delta codecs over a raw TCP socket: what changed of each tensor, encoded, sent, and applied in place.

The sender keeps what it sent last; the first version goes as a change of everything. The receiver checks nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from model_state import ModelState, allocate

from baselines.meeting import Listener, Stream, dial
from baselines.sockets import as_bytes
from weightcast.sync import TensorSpec

Elements = npt.NDArray[np.uint16]


class Codec(Protocol):
    """How a change of one tensor of 2-byte elements is written."""

    def encode(self, base: Elements, new: Elements) -> bytes:
        """What turns `base` into `new`."""
        ...

    def apply(self, payload: bytes, current: Elements) -> None:
        """Turn `current`, which is the base, into the new state."""
        ...


class DeltaSender:
    """See the module."""

    def __init__(self, codec: Codec, state: ModelState, options: Mapping[str, Any]) -> None:
        self._codec = codec
        self._state = state
        self._sent = allocate(state.specs())
        self._listener = Listener(options.get("host", "127.0.0.1"))
        self.address = self._listener.address

    def connect(self) -> None:
        """Take the receiver."""
        self._stream: Stream = self._listener.accept()

    def send(self, number: int) -> dict[str, Any]:
        """All changes; the answer counts their bytes."""
        num_bytes = 0
        for name, tensor in self._state.tensors.items():
            base, new = as_bytes(self._sent[name]).view(np.uint16), as_bytes(tensor).view(np.uint16)
            payload = self._codec.encode(base, new)
            self._stream.send(payload)
            num_bytes += len(payload)
            np.copyto(base, new)
        return {"num_bytes": num_bytes}

    def close(self) -> None:
        """End."""
        self._stream.close()


class DeltaReceiver:
    """See the module."""

    def __init__(self, codec: Codec, specs: Sequence[TensorSpec], address: str) -> None:
        self._codec = codec
        self.tensors = allocate(specs)
        self._stream = dial(address)

    def receive(self, number: int) -> dict[str, Any]:
        """All changes."""
        for tensor in self.tensors.values():
            self._codec.apply(self._stream.receive(), as_bytes(tensor).view(np.uint16))
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        self._stream.close()
