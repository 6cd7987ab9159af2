"""Megatron checkpoint to HF folder in one process, a block at a time: no model, memory bounded by a block.

Each HF tensor is put together from the checkpoint's chunks by the rules of its family, written to its place in a
safetensors file, and read back: the file counts as done when it has the digests of what was written. A run that was
killed goes on with the file at which it stopped; the folder takes its name only when it is whole.

    export_checkpoint(AutoBridge.from_hf_pretrained("path/to/hf"), Path("checkpoints/qwen3"), Path("out/qwen3"))
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.hf_folder import (
    DEFAULT_SHARD_BYTES,
    ShardFile,
    check_room,
    describe_files,
    plan_files,
    write_index,
)
from weightcast.bridges.progress import progress_bar
from weightcast.bridges.standalone_blocks import add_digest, read_digest, split_region
from weightcast.bridges.standalone_checkpoint import DistCheckpoint
from weightcast.bridges.standalone_import import ConversionReport
from weightcast.bridges.standalone_journal import RESUMES, Journal, mark_files
from weightcast.bridges.standalone_mapped import MappedCheckpoint
from weightcast.bridges.standalone_safetensors import SafetensorsWriter
from weightcast.bridges.standalone_stores import hf_store
from weightcast.bridges.whole_folder import explain_disk, partial_of, take_name
from weightcast.sync.checkpoint_files import CheckpointFiles
from weightcast.sync.digest import region_digest
from weightcast.sync.errors import CheckpointMismatch


def export_checkpoint(
    bridge: AutoBridge,
    checkpoint: Path,
    folder: Path,
    *,
    show_progress: bool = True,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> ConversionReport:
    """Write the weights of `checkpoint` to the HF folder `folder`, with the configuration and tokenizer of `bridge`.

    An older HF folder of the name is replaced. Values are cast to the dtypes of the bridge's own checkpoint or, where
    it has none, of its configuration. Raises `ConfigError` when `folder` holds anything else, `CheckpointMismatch` and
    `UnmappedTensor` when the checkpoint is damaged or of another model, `StorageError` when the disk is full.
    """
    folder = folder.absolute()
    check_room(folder)
    mapped = MappedCheckpoint.make(bridge, DistCheckpoint.open(checkpoint))
    files = plan_files(mapped.specs, shard_bytes, 1)
    partial = partial_of(folder)
    with explain_disk(folder, RESUMES), progress_bar("exporting", len(mapped.specs), show_progress) as advance:
        journal = Journal.open(partial, _about(mapped, files))
        resumed = len(journal.done)
        for file in files:
            if file.name not in journal.done:
                written = _write_file(mapped, file, partial / file.name)
                _check_file(file, partial / file.name, written)
                journal.add(file.name, {"digests": written})
            advance(len(file.specs))
        write_index(files, partial)
        bridge.write_companions(partial)
        journal.remove()
        take_name(partial, folder)
    return ConversionReport(
        num_tensors=len(mapped.specs),
        num_bytes=sum(spec.num_bytes for spec in mapped.specs),
        num_files=len(files),
        num_resumed=resumed,
        left_out=mapped.checkpoint.kinds_of_others(),
    )


def _write_file(mapped: MappedCheckpoint, file: ShardFile, path: Path) -> dict[str, int]:
    """Gives the digest of every tensor that was written."""
    digests: dict[str, int] = {}
    with SafetensorsWriter(path, file.specs) as writer:
        for spec in file.specs:
            for region in split_region(spec):
                data = mapped.read(region).to(spec.dtype).contiguous()
                writer.write(region, data)
                add_digest(digests, spec.name, region_digest(data, region))
    return digests


def _check_file(file: ShardFile, path: Path, digests: Mapping[str, int]) -> None:
    with hf_store(CheckpointFiles(path.parent, file.specs, {spec.name: path for spec in file.specs})) as store:
        for spec in file.specs:
            if read_digest(spec, store.read) != digests[spec.name]:
                raise CheckpointMismatch(
                    f"{spec.name} read back from {path} is not what was written; the disk or the memory is unsound: "
                    "try again, or another disk"
                )


def _about(mapped: MappedCheckpoint, files: tuple[ShardFile, ...]) -> dict[str, Any]:
    """What an interrupted export must have in common with this one to be gone on with."""
    paths = (chunk.path for chunks in mapped.checkpoint.chunks.values() for chunk in chunks)
    return {"export": mark_files(paths), "files": describe_files(files)}
