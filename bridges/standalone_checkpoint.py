"""Reads a `torch_dist` checkpoint by boxes of its global tensors, without Megatron, a model or a process group.

A checkpoint is torch.distributed.checkpoint's: `.metadata` lists every tensor and the chunks it is stored in, which
may have been cut by any layout. A box is put together from the parts of the chunks that it meets, read straight from
the files. `.metadata` is a pickle of torch's own and is read by torch: open checkpoints of people you trust.

    checkpoint = DistCheckpoint.open(Path("checkpoints/qwen3"))
    rows = checkpoint.read("embedding.word_embeddings.weight", (0, 0), (128, 2048))
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from weightcast.bridges.standalone_archive import find_data
from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import TensorSpec

CONFIG_FILE = "metadata.json"
METADATA_FILE = ".metadata"
LATEST_FILE = "latest_checkpointed_iteration.txt"
_BACKEND = "torch_dist"
# What training checkpoints hold besides weights, by the beginnings of its keys (Megatron-LM, Megatron-Bridge).
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")
_EXTRA_STATE = "_extra_state"
# What some trainers write in front of every weight's key.
_PREFIXES = ("model.", "module.")
_ITERATION = re.compile(r"iter_\d{7,}")


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a global tensor and where its archive lies."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    start_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DistCheckpoint:
    """The weights of a checkpoint by global key; `others` are keys of what is no weight (optimizer, extra state)."""

    folder: Path
    specs: Mapping[str, TensorSpec]
    chunks: Mapping[str, tuple[StoredChunk, ...]]
    others: tuple[str, ...]
    _places: dict[StoredChunk, int] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(path: Path) -> "DistCheckpoint":
        """Read the list of tensors of `path`, a checkpoint or a training run's folder of checkpoints.

        Raises `CheckpointMismatch` when it is none, of another format, or lacks a file.
        """
        folder = find_checkpoint(path)
        _check_format(folder)
        try:
            metadata = FileSystemReader(folder).read_metadata()
            entries, storage = metadata.state_dict_metadata, metadata.storage_data
        except Exception as error:  # whatever torch's unpickling of a damaged file raises
            raise CheckpointMismatch(
                f"{folder / METADATA_FILE} cannot be read ({error!r}); copy the checkpoint again"
            ) from error
        stored = {
            key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata) and _is_weight(key)
        }
        start = len(_common_prefix(stored))
        specs = {
            key[start:]: TensorSpec(key[start:], entry.properties.dtype, tuple(entry.size))
            for key, entry in stored.items()
        }
        chunks = {
            key[start:]: tuple(
                _locate(folder, key, storage, tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks
            )
            for key, entry in stored.items()
        }
        return DistCheckpoint(folder, specs, chunks, tuple(sorted(entries.keys() - stored.keys())))

    def kinds_of_others(self) -> Mapping[str, int]:
        """How many entries are no weights, by kind: the first part of their keys, or Transformer Engine's extra state.

        An object that is stored in parts counts once a part.
        """
        kinds = (_EXTRA_STATE if _EXTRA_STATE in key else re.split(r"[./]", key)[0] for key in self.others)
        return Counter(kinds)

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The box `offset`, `shape` of the global tensor `key`, new, on the CPU. Raises `CheckpointMismatch`."""
        spec = self.specs[key]
        result = torch.empty(tuple(shape), dtype=spec.dtype)
        found = 0
        for chunk in self.chunks[key]:
            low = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
            high = [
                min(a + size, b + extent)
                for a, size, b, extent in zip(offset, shape, chunk.offset, chunk.shape, strict=True)
            ]
            if all(a < b for a, b in zip(low, high, strict=True)):
                part = self._read_part(spec, chunk, low, high)
                result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = part
                found += part.numel()
        if found != result.numel():
            raise CheckpointMismatch(
                f"{self.folder} stores {found} of {result.numel()} elements of {key} at {tuple(offset)}; "
                "a file of another save is in the way, or the save did not end: save the checkpoint again"
            )
        return result

    def _read_part(self, spec: TensorSpec, chunk: StoredChunk, low: list[int], high: list[int]) -> torch.Tensor:
        """Rows of one chunk from its file, cut to the box `low`..`high` of the global tensor."""
        stored = TensorSpec(spec.name, spec.dtype, chunk.shape)
        if chunk not in self._places:
            self._places[chunk] = find_data(chunk.path, chunk.start_bytes, chunk.num_bytes, stored)
        row_bytes = stored.num_bytes // max(chunk.shape[0], 1) if chunk.shape else stored.num_bytes
        first, last = (low[0] - chunk.offset[0], high[0] - chunk.offset[0]) if chunk.shape else (0, 1)
        raw = np.fromfile(
            chunk.path, np.uint8, (last - first) * row_bytes, offset=self._places[chunk] + first * row_bytes
        )
        rows = torch.from_numpy(raw).view(spec.dtype).view((last - first, *chunk.shape[1:]) if chunk.shape else ())
        columns = [slice(a - o, b - o) for a, b, o in zip(low[1:], high[1:], chunk.offset[1:], strict=True)]
        return rows[(slice(None), *columns)] if chunk.shape else rows


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a Megatron checkpoint, or a training run's folder of them."""
    return any((path / name).is_file() for name in (CONFIG_FILE, METADATA_FILE, LATEST_FILE)) or bool(_iterations(path))


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or the checkpoint in it where it is the folder of a training run of Megatron's.

    That is the one which Megatron-LM's tracker names, and the last where there is no tracker (Megatron-Bridge has one
    of its own, a pickle). Raises `CheckpointMismatch` when the tracker names a folder that is not there.
    """
    latest = path / LATEST_FILE
    if (path / CONFIG_FILE).is_file() or (path / METADATA_FILE).is_file():
        return path
    if not latest.is_file():
        return max(_iterations(path), key=_iteration_of, default=path)
    said = latest.read_text().strip()
    folder = path / (f"iter_{int(said):07}" if said.isdigit() else said)
    if not folder.is_dir():
        raise CheckpointMismatch(
            f"{latest} says {said!r}, and there is no {folder}; name the checkpoint to take: "
            f"{', '.join(entry.name for entry in _iterations(path)) or 'the folder holds none'}"
        )
    return folder


def _iterations(path: Path) -> list[Path]:
    """A run's checkpoints that were written to their end, which is when the list of tensors is written."""
    if not path.is_dir():
        return []
    found = (entry for entry in path.iterdir() if _ITERATION.fullmatch(entry.name))
    return sorted((entry for entry in found if (entry / METADATA_FILE).is_file()), key=_iteration_of)


def _iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _check_format(folder: Path) -> None:
    config = folder / CONFIG_FILE
    try:
        backend = json.loads(config.read_text()).get("sharded_backend") if config.is_file() else None
    except (ValueError, AttributeError):
        backend = None
    if backend != _BACKEND or not (folder / METADATA_FILE).is_file():
        raise CheckpointMismatch(
            f"{folder} is no {_BACKEND} checkpoint ({CONFIG_FILE} says {backend!r}, {METADATA_FILE} "
            f"{'is there' if (folder / METADATA_FILE).is_file() else 'is missing'}); "
            "give a folder that save_megatron_model or Megatron's --ckpt-format torch_dist wrote to its end"
        )


def _is_weight(key: str) -> bool:
    return not key.startswith(_NOT_WEIGHTS) and not key.endswith(_EXTRA_STATE)


def _common_prefix(keys: Iterable[str]) -> str:
    """Which of `_PREFIXES` stands in front of all of `keys`, if one does."""
    names = list(keys)
    return next((prefix for prefix in _PREFIXES if names and all(name.startswith(prefix) for name in names)), "")


def _locate(
    folder: Path, key: str, storage: Mapping[MetadataIndex, object], offset: tuple[int, ...], shape: tuple[int, ...]
) -> StoredChunk:
    info = storage.get(MetadataIndex(key, offset))
    path = folder / str(getattr(info, "relative_path", "(no file)"))
    if info is None or not path.is_file() or path.stat().st_size < info.offset + info.length:  # type: ignore[attr-defined]
        raise CheckpointMismatch(
            f"{path} lacks the part of {key} at {offset}, which {METADATA_FILE} lists; the checkpoint is incomplete: "
            "copy or save it again"
        )
    return StoredChunk(offset, shape, path, info.offset, info.length)  # type: ignore[attr-defined]
