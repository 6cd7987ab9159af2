"""Merging files: HF folder and PEFT folder to HF folder, in blocks of rows, without a model of any kind.

Which weights are adapted the adapter's names say, so that any architecture will do whose linears are stored one by
one. The files, names, order and dtypes are the base's; sums are taken in fp32 and rounded once. The folder takes its
name when it is whole.

    merge_folder(Path("path/to/hf"), Path("my-lora"), Path("out/merged"))
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weightcast.bridges.hf_folder import (
    DEFAULT_SHARD_BYTES,
    ShardFile,
    check_room,
    describe_files,
    plan_files,
    write_index,
)
from weightcast.bridges.hf_source import HFSource, write_companions
from weightcast.bridges.peft.folder import AdapterFolder, read_adapter
from weightcast.bridges.peft.names import LORA_A, LORA_B, LORA_MAGNITUDE, peft_name
from weightcast.bridges.progress import progress_bar
from weightcast.bridges.rule_table import name_some
from weightcast.bridges.standalone_blocks import split_region
from weightcast.bridges.standalone_journal import RESUMES, Journal, mark_files
from weightcast.bridges.standalone_safetensors import SafetensorsWriter
from weightcast.bridges.standalone_stores import hf_store
from weightcast.bridges.whole_folder import explain_disk, partial_of, take_name
from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader, open_checkpoint
from weightcast.sync.errors import CheckpointMismatch, UnsupportedModel
from weightcast.sync.regions import Region, TensorSpec

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did."""

    num_tensors: int
    num_merged: int
    num_bytes: int


def merge_folder(
    base: Path, adapter: Path, out: Path, *, show_progress: bool = True, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> MergeReport:
    """Write `base` with the update of `adapter` to `out`; an older HF folder of the name is replaced.

    Memory is bounded by a block of 64 MiB, its sum in fp32, and one adapted weight's factors. Raises `ConfigError` when
    `out` holds anything else, `CheckpointMismatch` when the adapter is not of this base, `UnsupportedModel` when the
    base's adapted weights are quantised, `StorageError` when the disk refuses a write.
    """
    out = out.absolute()
    check_room(out)
    checkpoint, folder = open_checkpoint(base), read_adapter(adapter)
    adapted = _check_base(checkpoint, folder)
    files = plan_files(checkpoint.specs, shard_bytes, 1)
    source = HFSource.make(base)
    config = source.load_config()
    partial = partial_of(out)
    with explain_disk(out, RESUMES):
        journal = Journal.open(partial, _about(checkpoint, folder, files))
        _write_files(checkpoint, folder, adapted, files, journal, show_progress)
        write_index(files, partial)
        write_companions(config, source, partial)
        journal.remove()
        take_name(partial, out)
    return MergeReport(len(checkpoint.specs), len(adapted), sum(spec.num_bytes for spec in checkpoint.specs))


def _write_files(
    checkpoint: CheckpointFiles,
    folder: AdapterFolder,
    adapted: Collection[str],
    files: Sequence[ShardFile],
    journal: Journal,
    show_progress: bool,
) -> None:
    """Write the files that the journal lacks, beside it."""
    with (
        progress_bar("merging", len(checkpoint.specs), show_progress) as advance,
        folder.files.reader() as reader,
        hf_store(checkpoint) as store,
    ):
        for file in files:
            if file.name not in journal.done:
                with SafetensorsWriter(journal.path.with_name(file.name), file.specs) as writer:
                    for spec in file.specs:
                        update = Update.read(folder, spec.name, reader) if spec.name in adapted else None
                        for region in split_region(spec):
                            data = store.read(region)
                            writer.write(region, data if update is None else update.add_to(data, region))
                journal.add(file.name, {})
            advance(len(file.specs))


@dataclass(frozen=True, slots=True)
class Update:
    """The update of one weight, whole, in fp32."""

    factor_in: torch.Tensor
    factor_out: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None

    @staticmethod
    def read(folder: AdapterFolder, weight: str, reader: RegionReader) -> "Update":
        """The update of the base's tensor `weight`."""
        magnitude = reader.read_whole(peft_name(weight, LORA_MAGNITUDE)).float() if folder.config.use_dora else None
        factor_in, factor_out = (reader.read_whole(peft_name(weight, tensor)).float() for tensor in (LORA_A, LORA_B))
        return Update(factor_in, factor_out, folder.settings[weight].scaling, magnitude)

    def add_to(self, rows: torch.Tensor, region: Region) -> torch.Tensor:
        """`rows`, some whole rows of the weight, with their update, in their dtype."""
        own = region.slices[0]
        dtype = torch.promote_types(rows.dtype, torch.float32)
        merged = rows.to(dtype) + (self.factor_out[own] @ self.factor_in) * self.scaling
        if self.magnitude is not None:
            norms = torch.linalg.norm(merged, dim=1)
            merged = (self.magnitude[own] / norms).view(-1, 1) * merged
        return merged.to(rows.dtype)


def _check_base(base: CheckpointFiles, folder: AdapterFolder) -> set[str]:
    """The adapted weights, each of which the base has in the shape that the adapter wants."""
    specs = {spec.name: spec for spec in base.specs}
    adapted = folder.weights()
    if absent := sorted(adapted.keys() - specs.keys()):
        raise CheckpointMismatch(
            f"{folder.files.folder} adapts {name_some(absent)}, which is no tensor of {base.folder}; take the "
            f"adapter's own base model ({folder.config.base_model})"
        )
    shapes = {spec.name: spec.shape for spec in folder.files.specs}
    for name in adapted:
        wanted = _wanted_shapes(specs[name], folder.settings[name].rank)
        for tensor, shape in wanted.items():
            got = shapes.get(peft_name(name, tensor), shape)
            if got != shape:
                raise CheckpointMismatch(
                    f"{peft_name(name, tensor)} has shape {got} in {folder.files.folder}, but {name} of shape "
                    f"{specs[name].shape} wants {shape}; take the adapter's own base model ({folder.config.base_model})"
                )
        if specs[name].dtype not in _FLOATS:
            raise UnsupportedModel(
                f"{name} is stored as {specs[name].dtype} in {base.folder}, to which nothing can be added; decode the "
                "checkpoint to bfloat16 first (weightcast import, then export)"
            )
    return set(adapted)


def _wanted_shapes(spec: TensorSpec, rank: int) -> Mapping[str, tuple[int, ...]]:
    return {LORA_A: (rank, *spec.shape[1:]), LORA_B: (*spec.shape[:1], rank), LORA_MAGNITUDE: spec.shape[:1]}


def _about(base: CheckpointFiles, folder: AdapterFolder, files: Sequence[ShardFile]) -> dict[str, object]:
    """What an interrupted merge must have in common with this one to be gone on with."""
    paths = (*base.files.values(), *folder.files.files.values())
    return {"merge": mark_files(paths), "files": describe_files(files)}
