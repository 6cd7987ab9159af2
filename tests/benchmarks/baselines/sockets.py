"""Raw TCP sockets: `sendall` of each tensor, `recv_into` the receiver's own, 4 MiB at a time.

With the option `verify` it does what weightcast does with every byte, in the plainest way: the sender copies its
weights aside piece by piece (so that the trainer may go on), hashes each piece (xxh3-128) and digests each tensor; the
receiver takes a piece into a buffer, checks its hash, copies it to its place, and checks each whole tensor's digest.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from model_state import ModelState, allocate

from baselines.meeting import Listener, Stream, dial
from weightcast.sync import TensorSpec
from weightcast.sync.digest import region_digest

PIECE_BYTES = 4 << 20
_DIGEST = struct.Struct("<Q")
Bytes = npt.NDArray[np.uint8]


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """A contiguous CPU tensor's memory."""
    raw: Bytes = tensor.view(-1).view(torch.uint8).numpy()
    return raw


def pieces(raw: Bytes) -> Iterator[Bytes]:
    """4 MiB at a time."""
    for start in range(0, len(raw), PIECE_BYTES):
        yield raw[start : start + PIECE_BYTES]


class SocketSender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._listener = Listener(options.get("host", "127.0.0.1"))
        self._state = state
        self._aside = allocate(state.specs()) if options.get("verify") else None
        self.address = self._listener.address

    def connect(self) -> None:
        """Take the receiver."""
        self._stream: Stream = self._listener.accept()

    def send(self, number: int) -> dict[str, Any]:
        """All tensors."""
        for spec in self._state.specs():
            live = as_bytes(self._state.tensors[spec.name])
            if self._aside is None:
                for piece in pieces(live):
                    self._stream.socket.sendall(piece.data)
            else:
                self._send_checked(spec, live, self._aside[spec.name])
        return {}

    def _send_checked(self, spec: TensorSpec, live: Bytes, aside: torch.Tensor) -> None:
        for piece, copy in zip(pieces(live), pieces(as_bytes(aside)), strict=True):
            np.copyto(copy, piece)
            self._stream.socket.sendall(xxhash.xxh3_128_digest(copy.data))
            self._stream.socket.sendall(copy.data)
        self._stream.socket.sendall(_DIGEST.pack(region_digest(aside, spec.whole())))

    def close(self) -> None:
        """End."""
        self._stream.close()


class SocketReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs)
        self._specs = specs
        self._verify = bool(options.get("verify"))
        self._buffer = np.zeros(PIECE_BYTES, np.uint8)
        self._stream = dial(address)

    def receive(self, number: int) -> dict[str, Any]:
        """All tensors."""
        for spec in self._specs:
            raw = as_bytes(self.tensors[spec.name])
            for piece in pieces(raw):
                if self._verify:
                    self._receive_checked(piece)
                else:
                    self._stream.receive_into(piece.data)
            if self._verify:
                expected = bytearray(_DIGEST.size)
                self._stream.receive_into(memoryview(expected))
                if _DIGEST.pack(region_digest(self.tensors[spec.name], spec.whole())) != expected:
                    raise RuntimeError(f"{spec.name} was altered")
        return {}

    def _receive_checked(self, piece: Bytes) -> None:
        expected = bytearray(16)
        self._stream.receive_into(memoryview(expected))
        buffer = self._buffer[: len(piece)]
        self._stream.receive_into(buffer.data)
        if xxhash.xxh3_128_digest(buffer.data) != expected:
            raise RuntimeError("a piece was altered")
        np.copyto(piece, buffer)

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        self._stream.close()


def open_sender(state: ModelState, options: Mapping[str, Any]) -> SocketSender:
    """The trainer's side."""
    return SocketSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> SocketReceiver:
    """The engine's side."""
    return SocketReceiver(specs, address, options)
