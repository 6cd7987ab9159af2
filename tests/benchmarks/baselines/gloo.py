"""Gloo, one broadcast a parameter: the way SGLang's `update_weights_from_distributed` and older RL frameworks go.

As SGLang does, all broadcasts are started and then waited for.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from model_state import ModelState, allocate

from baselines.meeting import TIMEOUT_S, free_port
from weightcast.sync import TensorSpec


def join(address: str, rank: int) -> None:
    """A group of two; its rank 0 holds the store."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S)
    )


def broadcast_all(tensors: Mapping[str, torch.Tensor]) -> None:
    """Every tensor from rank 0 into every rank's own."""
    for work in [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors.values()]:
        work.wait()


class GlooSender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._state = state
        self.address = f"127.0.0.1:{free_port()}"

    def connect(self) -> None:
        """Form the group."""
        join(self.address, rank=0)

    def send(self, number: int) -> dict[str, Any]:
        """All tensors."""
        broadcast_all(self._state.tensors)
        return {}

    def close(self) -> None:
        """End."""
        dist.destroy_process_group()


class GlooReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs)
        join(address, rank=1)

    def receive(self, number: int) -> dict[str, Any]:
        """All tensors."""
        broadcast_all(self.tensors)
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        dist.destroy_process_group()


def open_sender(state: ModelState, options: Mapping[str, Any]) -> GlooSender:
    """The trainer's side."""
    return GlooSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> GlooReceiver:
    """The engine's side."""
    return GlooReceiver(specs, address, options)
