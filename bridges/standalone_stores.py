"""Stores: the tensors of a folder by name and box, whatever kind of folder it is, in bounded memory.

with open_store(Path("path/to/hf")) as store:
    first = store.read(next(split_region(store.specs[0])))
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from weightcast.bridges.standalone_checkpoint import DistCheckpoint, is_checkpoint
from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader, has_weights, open_checkpoint
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import Region, TensorSpec

# Safetensors files are mapped into memory; what was read counts as this process's until they are unmapped.
REMAP_BYTES = 64 * 2**20


class Store(Protocol):
    """Tensors by name."""

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, in the order in which they are stored."""
        ...

    def read(self, region: Region) -> torch.Tensor:
        """The values of a region, on the CPU, in the dtype in which they are stored."""
        ...


class HFStore:
    """The safetensors of a folder; they are mapped anew now and then, so that reading all of them stays small."""

    def __init__(self, checkpoint: CheckpointFiles) -> None:
        self.checkpoint = checkpoint
        self.specs = checkpoint.specs
        self._stack = ExitStack()
        self._reader: RegionReader | None = None

    def read(self, region: Region) -> torch.Tensor:
        if self._reader is None or self._reader.num_bytes > REMAP_BYTES:
            self.close()
            self._reader = self._stack.enter_context(self.checkpoint.reader())
        return self._reader.read(region)

    def close(self) -> None:
        """Unmap the files."""
        self._stack.close()
        self._reader = None


class DistStore:
    """A Megatron checkpoint under Megatron's own names."""

    def __init__(self, checkpoint: DistCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.specs = tuple(checkpoint.specs.values())

    def read(self, region: Region) -> torch.Tensor:
        return self.checkpoint.read(region.name, region.offset, region.shape)


@contextmanager
def hf_store(checkpoint: CheckpointFiles) -> Iterator[HFStore]:
    """A store over open files."""
    store = HFStore(checkpoint)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def open_store(path: Path) -> Iterator[HFStore | DistStore]:
    """The store of a folder. Raises `ConfigError` when it is neither kind, `CheckpointMismatch` when it is damaged."""
    if has_weights(path):
        with hf_store(open_checkpoint(path)) as store:
            yield store
    elif is_checkpoint(path):
        yield DistStore(DistCheckpoint.open(path))
    else:
        raise ConfigError(
            f"{path} holds neither safetensors under HF's names nor a Megatron checkpoint; give a folder that "
            "save_pretrained, weightcast or Megatron wrote"
        )
