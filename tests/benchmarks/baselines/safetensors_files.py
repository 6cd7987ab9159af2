"""Files: the trainer saves safetensors, the engine loads them into its parameters, as `update_weights_from_disk` does.

Nothing is forced to the disk (`fsync`), so the file is read back from the page cache: the best that files can do.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model_state import ModelState, allocate
from safetensors import safe_open
from safetensors.torch import save_file

from baselines.meeting import Listener, Stream, dial
from weightcast.sync import TensorSpec


class SavingSender:
    """See the module."""

    def __init__(self, state: ModelState, options: Mapping[str, Any]) -> None:
        self._state = state
        self._folder = tempfile.TemporaryDirectory()
        self._listener = Listener("127.0.0.1")
        self.address = self._listener.address

    def connect(self) -> None:
        """Take the receiver."""
        self._stream: Stream = self._listener.accept()

    def send(self, number: int) -> dict[str, Any]:
        """Save over the file of the version before, and name it."""
        file = Path(self._folder.name) / "model.safetensors"
        save_file(self._state.tensors, file)
        self._stream.send(str(file).encode())
        return {}

    def close(self) -> None:
        """End."""
        self._stream.close()
        self._folder.cleanup()


class LoadingReceiver:
    """See the module."""

    def __init__(self, specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> None:
        self.tensors = allocate(specs)
        self._stream = dial(address)

    def receive(self, number: int) -> dict[str, Any]:
        """Load it tensor by tensor."""
        with safe_open(self._stream.receive().decode(), framework="pt") as file:
            for name, tensor in self.tensors.items():
                tensor.copy_(file.get_tensor(name))
        return {}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """End."""
        self._stream.close()


def open_sender(state: ModelState, options: Mapping[str, Any]) -> SavingSender:
    """The trainer's side."""
    return SavingSender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> LoadingReceiver:
    """The engine's side."""
    return LoadingReceiver(specs, address, options)
