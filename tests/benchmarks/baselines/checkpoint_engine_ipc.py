"""checkpoint-engine on one GPU: trainer parameters into pinned memory, from there through CUDA IPC buckets.

As its README has it: `register_checkpoint`, `gather_metas`, `update`; its worker's `update_weights_from_ipc` in the
engine's process, with a `run` that copies each tensor into its parameter. The pool of pinned memory is kept between
versions (`use_shared_memory_pool`). The socket paths go to the engine over a stream, where an HTTP request would.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import zmq
from model_state import ModelState, allocate

from baselines.meeting import Listener, Stream, dial, free_port
from weightcast.sync import TensorSpec

CHECKPOINT = "bench"


class CheckpointEngineSender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        from checkpoint_engine import ParameterServer

        # It takes `rank=0` for "not given", so the variables are needed too.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        self._state = state
        self._server = ParameterServer(
            rank=0, world_size=1, auto_pg=True, master_addr="127.0.0.1", master_port=free_port()
        )
        self._listener = Listener("127.0.0.1")
        self.address = self._listener.address

    def connect(self) -> None:
        """Take the receiver."""
        self._stream: Stream = self._listener.accept()

    def send(self, number: int) -> dict[str, Any]:
        """One version."""
        self._server.register_checkpoint(CHECKPOINT, named_tensors=self._state.tensors, use_shared_memory_pool=True)
        try:
            self._server.gather_metas(CHECKPOINT)
            self._server.update(CHECKPOINT, self._request_update)
        finally:
            self._server.unregister_checkpoint(CHECKPOINT)
        return {}

    def _request_update(self, socket_paths: list[tuple[str, str]]) -> None:
        """Called in a thread of its own; the one engine has the one GPU."""
        ((_, path),) = socket_paths
        self._stream.send(json.dumps(path).encode())

    def close(self) -> None:
        """End."""
        self._server.unregister_checkpoint(CHECKPOINT, force=True)
        self._stream.close()


class CheckpointEngineReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs, "cuda")
        self._context = zmq.Context()
        self._stream = dial(address)

    def receive(self, number: int) -> dict[str, Any]:
        """One version; it synchronises the device before it answers."""
        from checkpoint_engine import update_weights_from_ipc

        path = json.loads(self._stream.receive())
        update_weights_from_ipc(self._context, path, device_id=torch.cuda.current_device(), run=self._load)
        return {}

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.tensors[name].copy_(tensor)

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        self._stream.close()
        self._context.destroy(linger=0)


def open_sender(state: ModelState, options: Mapping[str, Any]) -> CheckpointEngineSender:
    """The trainer's side."""
    return CheckpointEngineSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> CheckpointEngineReceiver:
    """The engine's side."""
    return CheckpointEngineReceiver(specs, address, options)
