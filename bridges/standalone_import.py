"""HF folder to Megatron checkpoint in one process, a chunk at a time: no model, no more memory than one file's worth.

Megatron says on meta tensors what the model's global tensors are; each is read from the safetensors files by its
rules, chunk by chunk, and written through torch.distributed.checkpoint. The folder takes its name only when all of it
was read back and had the digests of what was read from the source. A run that was killed goes on where it stopped.

    import_checkpoint(AutoBridge.from_hf_pretrained("path/to/hf"), Path("checkpoints/qwen3"))
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import common as common_strategy
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.dry_run_stages import Box, apply_layout, fake_world, read_seats
from weightcast.bridges.hf_import import check_copy
from weightcast.bridges.pieces import map_shard
from weightcast.bridges.progress import progress_bar
from weightcast.bridges.rule_table import RuleTable
from weightcast.bridges.shards import SHARDING_METADATA
from weightcast.bridges.standalone_blocks import add_digest, read_digest, split_box, split_region
from weightcast.bridges.standalone_checkpoint import DistCheckpoint
from weightcast.bridges.standalone_journal import RESUMES, Journal, mark_files
from weightcast.bridges.standalone_mapped import MappedCheckpoint, table_of
from weightcast.bridges.whole_folder import check_new, explain_disk, partial_of, take_new_name
from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader
from weightcast.sync.digest import region_digest
from weightcast.sync.errors import CheckpointMismatch

# torch's writer keeps every tensor of a file until the file is complete.
FILE_BYTES = 256 * 2**20
# A stored chunk is what Megatron reads at once; blocks that are read here are smaller.
STORED_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did."""

    num_tensors: int
    """HF tensors."""
    num_bytes: int
    """Bytes of values written."""
    num_files: int
    num_resumed: int
    """Files that an earlier run had left."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Entries of the source that are no weights (optimizer, random states, ...), counted by kind."""


def import_checkpoint(
    bridge: AutoBridge, folder: Path, *, show_progress: bool = True, file_bytes: int = FILE_BYTES
) -> ConversionReport:
    """Write the bridge's weights to `folder`, new or empty, as `save_megatron_model` would; in this process alone.

    Raises `ConfigError` when the folder holds something, `CheckpointMismatch` and `UnmappedTensor` when the source is
    damaged or of another model, `StorageError` when the disk is full. Needs a process without a process group.
    """
    check_new(folder)
    source = bridge.hf_checkpoint()
    table = table_of(bridge, source.specs)
    files = list(_plan_files(_read_boxes(bridge), file_bytes))
    partial = partial_of(folder.absolute())
    with explain_disk(folder, RESUMES), progress_bar("importing", 2 * len(files), show_progress) as advance:
        journal = Journal.open(partial, _about(source, files))
        job = _Import(bridge, source, table, partial, files)
        resumed = len(journal.done)
        job.check_copies()
        for number in range(len(files)):
            if job.file_name(number) not in journal.done:
                journal.add(job.file_name(number), job.write_file(number))
            advance(1)
        job.finish(journal.done)
        job.verify(journal.done)
        advance(len(files))
        journal.remove()
        take_new_name(partial, folder)
    num_bytes = sum(_num_bytes(box) for file in files for box in file)
    return ConversionReport(len(source.specs), num_bytes, len(files), resumed)


@dataclass(frozen=True, slots=True)
class _Import:
    bridge: AutoBridge
    source: CheckpointFiles
    table: RuleTable
    folder: Path
    files: Sequence[Sequence[Box]]

    def file_name(self, number: int) -> str:
        """As torch names the only file of rank `number`."""
        return f"__{number}_0.distcp"

    def check_copies(self) -> None:
        """Tied tensors that the source stores twice are the same."""
        with self.source.reader() as reader:
            for spec in self.source.specs:
                for region in split_region(spec) if spec.name in self.table.copies else ():
                    check_copy(reader, self.source, region, self.table.copies[spec.name])

    def write_file(self, number: int) -> dict[str, Any]:
        """Write one file; gives the place of each chunk and the digests of what was read, by HF tensor."""
        digests: dict[str, int] = {}
        items = [_write_item(box) for box in self.files[number]]
        writer = FileSystemWriter(self.folder)
        plan = writer.prepare_global_plan([SavePlan([])] * number + [SavePlan(items)])[number]
        with self.source.reader() as reader:
            planner = _ChunkPlanner(self.files[number], self.table, reader, digests)
            results = writer.write_data(plan, planner).wait()
        chunks = [
            [result.index.fqn, list(result.index.offset or ()), result.storage_data.offset, result.storage_data.length]
            for result in results
        ]
        return {"chunks": chunks, "digests": digests}

    def finish(self, done: Mapping[str, Any]) -> None:
        """Write what makes the files a checkpoint: torch's metadata and Megatron's two files."""
        results = [
            WriteResult(MetadataIndex(key, offset), length, _StorageInfo(file, start, length))
            for file, record in done.items()
            for key, offset, start, length in record["chunks"]
        ]
        tensors: dict[str, list[Box]] = {}
        for box in (box for file in self.files for box in file):
            tensors.setdefault(box.key, []).append(box)
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            key: TensorStorageMetadata(
                TensorProperties(dtype=boxes[0].dtype),
                torch.Size(boxes[0].global_shape),
                [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in boxes],
            )
            for key, boxes in tensors.items()
        }
        with fake_world(0, 1):
            _save_common({"content_metadata": dict(SHARDING_METADATA)}, self.folder)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        (self.folder / ".metadata").unlink(missing_ok=True)
        FileSystemWriter(self.folder).finish(Metadata(state_dict_metadata=entries, planner_data={}), [results])

    def verify(self, done: Mapping[str, Any]) -> None:
        """Read everything back. Raises `CheckpointMismatch` when a tensor is not what was read from the source."""
        wanted: dict[str, int] = {}
        for record in done.values():
            for name, digest in record["digests"].items():
                add_digest(wanted, name, digest)
        mapped = MappedCheckpoint.make(self.bridge, DistCheckpoint.open(self.folder))
        for spec in (spec for spec in mapped.specs if spec.name not in self.table.copies):
            if read_digest(spec, mapped.read) != wanted[spec.name]:
                raise CheckpointMismatch(
                    f"{spec.name} read back from {self.folder} is not what {self.source.files[spec.name]} holds; the "
                    "disk or the memory is unsound, or the source changed meanwhile: delete the folder and try again"
                )


class _ChunkPlanner(DefaultSavePlanner):
    """Makes each chunk when torch's writer asks for it."""

    def __init__(self, boxes: Sequence[Box], table: RuleTable, reader: RegionReader, digests: dict[str, int]) -> None:
        super().__init__()
        self._boxes = {(box.key, box.offset): box for box in boxes}
        self._table, self._reader, self._digests = table, reader, digests

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        box = self._boxes[write_item.index.fqn, tuple(write_item.index.offset or ())]
        data = torch.zeros(box.shape, dtype=box.dtype)  # rows of padding stay zero
        segments = self._table.segments(box.key, box.global_shape, box.offset, box.shape)
        for piece in map_shard(segments, box.offset, box.shape):
            found = self._reader.read(piece.region).to(box.dtype).contiguous()
            piece.of_box(data).copy_(piece.of_region(found))
            if piece.lane is None or piece.lane.number == 0:  # one lane vouches for all of the region
                add_digest(self._digests, piece.region.name, region_digest(found, piece.region))
        return data


def _save_common(common: Mapping[str, Any], folder: Path) -> None:
    """Megatron's file of what is no tensor, through a class up to megatron-core 0.16 and a function after it."""
    strategy: Any = common_strategy
    older = getattr(strategy, "TorchCommonSaveStrategy", None)
    save = strategy.save_common if older is None else older("torch", 1).save_common
    save(dict(common), str(folder))


def _read_boxes(bridge: AutoBridge) -> tuple[Box, ...]:
    """The chunks of the model's global tensors, as one rank alone would hold them."""
    provider = bridge.to_megatron_provider(load_weights=False)
    apply_layout(provider, Layout())
    ((_, boxes),) = read_seats(provider, Layout())
    return boxes


def _plan_files(boxes: Sequence[Box], file_bytes: int) -> Iterator[tuple[Box, ...]]:
    """The chunks of each file: as many as fit, in Megatron's order."""
    file: list[Box] = []
    for chunk in (chunk for box in boxes for chunk in _split(box, min(STORED_CHUNK_BYTES, file_bytes))):
        if file and sum(map(_num_bytes, file)) + _num_bytes(chunk) > file_bytes:
            yield tuple(file)
            file = []
        file.append(chunk)
    yield tuple(file)


def _split(box: Box, max_bytes: int) -> Iterator[Box]:
    for offset, shape in split_box(box.shape, box.dtype.itemsize, max_bytes):
        start = tuple(a + b for a, b in zip(box.offset, offset, strict=True))
        yield replace(box, offset=start, shape=shape)


def _num_bytes(box: Box) -> int:
    return torch.Size(box.shape).numel() * box.dtype.itemsize


def _write_item(box: Box) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
    data = TensorWriteData(chunk, TensorProperties(dtype=box.dtype), torch.Size(box.global_shape))
    return WriteItem(MetadataIndex(box.key, box.offset), WriteItemType.SHARD, tensor_data=data)


def _about(source: CheckpointFiles, files: Sequence[Sequence[Box]]) -> dict[str, Any]:
    """What an interrupted import must have in common with this one to be gone on with."""
    return {
        "import": mark_files(source.files.values()),
        "files": [[len(file), sum(map(_num_bytes, file)), file[0].key, str(file[0].dtype)] for file in files],
    }
