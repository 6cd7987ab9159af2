"""Dense XOR under zstandard, slime's default form (level 1): old bits XOR new bits, compressed, a tensor at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zstandard
from model_state import ModelState

from baselines.delta_sockets import DeltaReceiver, DeltaSender, Elements
from weightcast.sync import TensorSpec

LEVEL = 1


class XorZstd:
    """A `Codec`."""

    def encode(self, base: Elements, new: Elements) -> bytes:
        """Mostly zeros, compressed."""
        return bytes(zstandard.ZstdCompressor(level=LEVEL).compress((base ^ new).data))

    def apply(self, payload: bytes, current: Elements) -> None:
        """XOR again."""
        current ^= np.frombuffer(zstandard.ZstdDecompressor().decompress(payload), np.uint16)


def open_sender(state: ModelState, options: Mapping[str, Any]) -> DeltaSender:
    """The trainer's side."""
    return DeltaSender(XorZstd(), state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> DeltaReceiver:
    """The engine's side."""
    return DeltaReceiver(XorZstd(), specs, address)
