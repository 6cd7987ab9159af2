"""Mooncake's transfer engine over TCP: the sender writes its tensors into the receiver's registered memory.

Peers find each other by its own handshake (`P2PHANDSHAKE`), without a metadata server. Writes go in one batch of
slices of at most 1 MiB, which was twice as fast here as one write a tensor.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from model_state import ModelState, allocate
from mooncake.engine import TransferEngine

from baselines.meeting import Listener, Stream, dial
from weightcast.sync import TensorSpec

SLICE_BYTES = 1 << 20


def make_engine(tensors: Mapping[str, torch.Tensor]) -> TransferEngine:
    """An engine that may read and write these tensors."""
    engine = TransferEngine()
    check(engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""), "initialize")
    for tensor in tensors.values():
        check(engine.register_memory(tensor.data_ptr(), tensor.nbytes), "register_memory")
    return engine


def check(status: int, what: str) -> None:
    """Mooncake answers 0 when all is well."""
    if status != 0:
        raise RuntimeError(f"Mooncake's {what} answered {status}")


class MooncakeSender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._state = state
        self._engine = make_engine(state.tensors)
        self._listener = Listener("127.0.0.1")
        self.address = self._listener.address

    def connect(self) -> None:
        """Learn the receiver's name and addresses, and cut the slices."""
        self._stream: Stream = self._listener.accept()
        told = json.loads(self._stream.receive())
        self._peer: str = told["peer"]
        self._slices: list[tuple[int, int, int]] = []
        for name, tensor in self._state.tensors.items():
            for start in range(0, tensor.nbytes, SLICE_BYTES):
                length = min(SLICE_BYTES, tensor.nbytes - start)
                self._slices.append((tensor.data_ptr() + start, told["pointers"][name] + start, length))

    def send(self, number: int) -> dict[str, Any]:
        """Write all, then say so."""
        ours, theirs, lengths = (list(column) for column in zip(*self._slices, strict=True))
        status = self._engine.batch_transfer_sync_write(self._peer, ours, theirs, lengths)
        check(status, "batch_transfer_sync_write")
        self._stream.send(b"there")
        return {}

    def close(self) -> None:
        """End."""
        self._stream.close()


class MooncakeReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs)
        self._engine = make_engine(self.tensors)
        self._stream = dial(address)
        pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        peer = f"127.0.0.1:{self._engine.get_rpc_port()}"
        self._stream.send(json.dumps({"peer": peer, "pointers": pointers}).encode())

    def receive(self, number: int) -> dict[str, Any]:
        """Wait for the word; the bytes come without this process's help."""
        assert self._stream.receive() == b"there"
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        self._stream.close()


def open_sender(state: ModelState, options: Mapping[str, Any]) -> MooncakeSender:
    """The trainer's side."""
    return MooncakeSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> MooncakeReceiver:
    """The engine's side."""
    return MooncakeReceiver(specs, address, options)
