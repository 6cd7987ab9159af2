"""HF folders: safetensors files, their index and what belongs beside them, written by all ranks together.

Each file has one writer, the files go round the ranks, and a writer's memory is bounded by one file and one batch.
Everything is written into a sibling of the wanted folder, which takes its name only when it is whole: a run that
dies leaves no folder that looks complete. The ranks of a job must share the file system.

    save_weights(plan, Path("out/my-model"), write_extras=config.save_pretrained)
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightcast.bridges.exchange import agreement, get_rank, get_world_size, send_parcels
from weightcast.bridges.hf_export import gather_routes
from weightcast.bridges.hf_source import COMPANION_FILES, CONFIG_FILE
from weightcast.bridges.parcels import LiveRegions, Parcel, Routes, split_batches
from weightcast.bridges.plan import Plan
from weightcast.bridges.whole_folder import explain_disk, on_rank_zero, partial_of, start_empty, take_name
from weightcast.sync.checkpoint_files import INDEX_FILE, SINGLE_FILE
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import TensorSpec

DEFAULT_SHARD_BYTES = 5 * 10**9
DEFAULT_BATCH_BYTES = 512 * 2**20
# What a folder that is replaced may hold; anything else in it is somebody's work and must not be deleted.
_HF_FILES = ("*.safetensors", INDEX_FILE, CONFIG_FILE, *COMPANION_FILES, "*.md", ".gitattributes")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file of a folder, and the rank that writes it."""

    name: str
    specs: tuple[TensorSpec, ...]
    writer: int


def plan_files(specs: Sequence[TensorSpec], max_bytes: int, world_size: int) -> tuple[ShardFile, ...]:
    """Files of at most `max_bytes` of whole tensors, in HF order, their writers in turn. Pure."""
    runs = split_batches(specs, max_bytes)
    names = [f"model-{number:05}-of-{len(runs):05}.safetensors" for number in range(1, len(runs) + 1)]
    if len(runs) == 1:
        names = [SINGLE_FILE]
    return tuple(
        ShardFile(name, run, writer=number % world_size)
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    )


@torch.no_grad()
def save_weights(
    plan: Plan,
    folder: Path,
    *,
    write_extras: Callable[[Path], None] | None = None,
    progress: Callable[[int], None] = lambda num_tensors: None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
) -> None:
    """Write all HF tensors of `plan` to `folder`; every rank must call it.

    `write_extras` is called on rank 0 with the folder under construction (configuration, tokenizer); `progress` with
    the number of tensors done since the last call. An older HF folder of the name is replaced. Raises `ConfigError`
    when the folder holds anything else (a `BridgeError` on the ranks that did not look), and `StorageError` on every
    rank when the disk refuses a write.
    """
    with explain_disk(folder):
        _save(plan, folder, write_extras, progress, shard_bytes, batch_bytes)


def _save(
    plan: Plan,
    folder: Path,
    write_extras: Callable[[Path], None] | None,
    progress: Callable[[int], None],
    shard_bytes: int,
    batch_bytes: int,
) -> None:
    partial = partial_of(folder)
    on_rank_zero(lambda: _make_room(folder, partial), f"making room for {folder}")
    files = plan_files(plan.specs, shard_bytes, get_world_size())
    routes = gather_routes(plan)
    live = LiveRegions(plan.regions)
    for start in range(0, len(files), get_world_size()):
        mine: dict[str, torch.Tensor] = {}
        round_files = files[start : start + get_world_size()]
        for num_tensors in _gather_round(round_files, routes, live, mine, batch_bytes):
            progress(num_tensors)
        _write_mine(round_files, mine, partial)

    def finish() -> None:
        write_index(files, partial)
        if write_extras is not None:
            write_extras(partial)
        take_name(partial, folder)

    on_rank_zero(finish, f"finishing {folder}")


def _gather_round(
    files: Sequence[ShardFile], routes: Routes, live: LiveRegions, mine: dict[str, torch.Tensor], batch_bytes: int
) -> Iterator[int]:
    """Bring the tensors of one file to each writer; `mine` receives this rank's. Yields numbers of tensors."""
    batches = zip_longest(*(split_batches(file.specs, batch_bytes // len(files)) for file in files), fillvalue=())
    for batch in batches:
        parcels_to: dict[int, tuple[Parcel, ...]] = {}
        for file, specs in zip(files, batch, strict=True):
            parcels_to[file.writer] = routes.parcels(specs, to=file.writer)
            if file.writer == get_rank():
                mine.update({spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs})
        send_parcels(parcels_to, live, mine)
        yield sum(len(specs) for specs in batch)


def _write_mine(files: Sequence[ShardFile], tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    with agreement(f"writing safetensors files to {folder}"):
        for file in files:
            if file.writer == get_rank():
                save_file(dict(tensors), folder / file.name, metadata={"format": "pt"})


def describe_files(files: Sequence[ShardFile]) -> list[Any]:
    """What is to be in which file, in JSON's types."""
    return [[file.name, [[spec.name, str(spec.dtype), list(spec.shape)] for spec in file.specs]] for file in files]


def write_index(files: Sequence[ShardFile], folder: Path) -> None:
    """Write the index of `files` to `folder`, as transformers does: none for a single file."""
    if len(files) == 1:
        return
    specs = [spec for file in files for spec in file.specs]
    index = {
        "metadata": {
            "total_parameters": sum(spec.numel for spec in specs),
            "total_size": sum(spec.num_bytes for spec in specs),
        },
        "weight_map": {spec.name: file.name for file in files for spec in file.specs},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _make_room(folder: Path, partial: Path) -> None:
    check_room(folder)
    start_empty(partial)


def check_room(folder: Path) -> None:
    """Raise `ConfigError` unless `folder` may be replaced: it is not there, empty, or an older HF folder."""
    if folder.exists():
        strange = [
            entry.name
            for entry in (folder.iterdir() if folder.is_dir() else [folder])
            if entry.is_dir() or not any(fnmatch(entry.name, pattern) for pattern in _HF_FILES)
        ]
        if strange:
            raise ConfigError(
                f"{folder} exists and holds {strange[0]}, which no export wrote; give a folder that is new, empty, or "
                "an older export"
            )
