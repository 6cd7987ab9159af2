"""Pickled tensors over ZeroMQ: `send_pyobj((name, tensor))` a tensor, copied into the receiver's parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

import zmq
from model_state import ModelState, allocate

from weightcast.sync import TensorSpec

# Pickled tensors under way; without a mark the whole model would queue up in memory.
HIGH_WATER_MARK = 4


class PicklingSender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._state = state
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.sndhwm = HIGH_WATER_MARK
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def connect(self) -> None:
        """Wait for the receiver's word."""
        self._socket.recv()

    def send(self, number: int) -> dict[str, Any]:
        """All tensors."""
        for item in self._state.tensors.items():
            self._socket.send_pyobj(item)
        return {}

    def close(self) -> None:
        """End."""
        self._context.destroy(linger=0)


class PicklingReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.rcvhwm = HIGH_WATER_MARK
        self._socket.connect(address)
        self._socket.send(b"")

    def receive(self, number: int) -> dict[str, Any]:
        """All tensors."""
        for _ in self.tensors:
            name, tensor = self._socket.recv_pyobj()
            self.tensors[name].copy_(tensor)
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        self._context.destroy(linger=0)


def open_sender(state: ModelState, options: Mapping[str, Any]) -> PicklingSender:
    """The trainer's side."""
    return PicklingSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> PicklingReceiver:
    """The engine's side."""
    return PicklingReceiver(specs, address, options)
