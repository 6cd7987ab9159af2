"""`torch.distributed.rpc` (TensorPipe): a call a tensor that copies it into the receiver's parameter.

A few calls are under way at once; without that bound every tensor's message would be held in memory.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import torch
import torch.distributed.rpc as torch_rpc
from model_state import ModelState, allocate

from baselines.meeting import TIMEOUT_S, free_port
from weightcast.sync import TensorSpec

UNDER_WAY = 4
# Calls reach a process, not an object: the receiver leaves its parameters here for them.
_parameters: dict[str, torch.Tensor] = {}
_complete = Event()


def take(name: str, tensor: torch.Tensor) -> None:
    """Runs in the receiver."""
    _parameters[name].copy_(tensor)


def complete() -> None:
    """Runs in the receiver: all have come."""
    _complete.set()


def join(name: str, address: str, rank: int) -> None:
    """Both ends."""
    backend_options = torch_rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=4, rpc_timeout=TIMEOUT_S, init_method=f"tcp://{address}"
    )
    torch_rpc.init_rpc(  # type: ignore[no-untyped-call]
        name, rank=rank, world_size=2, rpc_backend_options=backend_options
    )


class RpcSender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._state = state
        self.address = f"127.0.0.1:{free_port()}"

    def connect(self) -> None:
        """Form the group."""
        join("trainer", self.address, rank=0)

    def send(self, number: int) -> dict[str, Any]:
        """All tensors."""
        under_way: deque[torch.futures.Future[None]] = deque()
        for item in self._state.tensors.items():
            if len(under_way) == UNDER_WAY:
                under_way.popleft().wait()
            under_way.append(torch_rpc.rpc_async("engine", take, args=item))
        for future in under_way:
            future.wait()
        torch_rpc.rpc_sync("engine", complete)
        return {}

    def close(self) -> None:
        """End."""
        torch_rpc.shutdown()


class RpcReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs)
        _parameters.update(self.tensors)
        join("engine", address, rank=1)

    def receive(self, number: int) -> dict[str, Any]:
        """All tensors."""
        if not _complete.wait(TIMEOUT_S):
            raise TimeoutError("the calls did not come")
        _complete.clear()
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        torch_rpc.shutdown()


def open_sender(state: ModelState, options: Mapping[str, Any]) -> RpcSender:
    """The trainer's side."""
    return RpcSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> RpcReceiver:
    """The engine's side."""
    return RpcReceiver(specs, address, options)
