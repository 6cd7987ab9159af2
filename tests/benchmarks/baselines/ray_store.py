"""Ray's object store: `ray.put` of the model's arrays, `ray.get` in the engine's process, a copy into its parameters.

Arrays, not torch tensors, because Ray keeps them out of the pickle and maps them in the reader's process without a
copy. The two processes are drivers of one local cluster, and the reference goes through a named actor.
"""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from model_state import ModelState, allocate

from baselines.sockets import as_bytes
from weightcast.sync import TensorSpec

NAMESPACE = "weightcast-bench"
MAILBOX = "mailbox"
# The store holds the version that is read and the one that comes.
STORE_MODELS = 2.5


class Mailbox:
    """An actor that hands references of one driver to the other."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[list[Any]] = asyncio.Queue()

    async def leave(self, references: list[Any]) -> None:
        """Leave a reference, in a list, so that Ray does not resolve it."""
        await self._queue.put(references)

    async def take(self) -> list[Any]:
        """The oldest one, as soon as there is one."""
        return await self._queue.get()


def join(folder: str, **arguments: Any) -> None:
    """Begin the cluster whose files lie in `folder`, or join it.

    It is found there, not named by its address: then Ray shows the token that a local cluster asks for by itself.
    """
    ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level="error", _temp_dir=folder, **arguments)


class RaySender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._state = state
        self._arrays: dict[str, npt.NDArray[np.uint8]] = {name: as_bytes(t) for name, t in state.tensors.items()}
        store_bytes = max(int(STORE_MODELS * state.num_bytes), 256 << 20)
        self._folder = tempfile.TemporaryDirectory(prefix="ray-")
        self.address = self._folder.name
        join(self.address, num_cpus=2, include_dashboard=False, object_store_memory=store_bytes, _memory=256 << 20)
        self._mailbox: Any = ray.remote(Mailbox).options(name=MAILBOX, num_cpus=0).remote()

    def connect(self) -> None:
        """See that the mailbox is up."""
        ray.get(self._mailbox.__ray_ready__.remote())

    def send(self, number: int) -> dict[str, Any]:
        """Put and hand over; the reference of the version before is given up."""
        self._reference = ray.put(self._arrays)
        ray.get(self._mailbox.leave.remote([self._reference]))
        return {}

    def close(self) -> None:
        """End the cluster."""
        ray.shutdown()
        self._folder.cleanup()


class RayReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors: dict[str, torch.Tensor] = allocate(specs)
        join(address, address="auto")
        self._mailbox: Any = ray.get_actor(MAILBOX)

    def receive(self, number: int) -> dict[str, Any]:
        """Take the reference, map the arrays, copy."""
        (reference,) = ray.get(self._mailbox.take.remote())
        for name, array in ray.get(reference).items():
            np.copyto(as_bytes(self.tensors[name]), array)
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Leave."""
        ray.shutdown()


def open_sender(state: ModelState, options: Mapping[str, Any]) -> RaySender:
    """The trainer's side."""
    return RaySender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> RayReceiver:
    """The engine's side."""
    return RayReceiver(specs, address, options)
