"""Codecs: checkpoints whose tensors are stored as codes and scales, read as the weights that they stand for.

DeepSeek V3 and its kin are published in FP8 (`codecs_fp8`), gpt-oss in MXFP4 (`codecs_mxfp4`). `decode_checkpoint`
gives a checkpoint of weights, whose reader decodes the boxes that it is asked for and reads no byte besides. Exports
hold the weights in the model's own dtype: code them again with the tool of the engine that wants codes.

    checkpoint = decode_checkpoint(open_checkpoint(folder), torch.bfloat16)
    import_weights(plan, checkpoint)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weightcast.bridges import codecs_fp8, codecs_mxfp4
from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader
from weightcast.sync.regions import Region, TensorSpec

ReadDecoded = Callable[[Region, Callable[[Region], torch.Tensor], torch.dtype], torch.Tensor]
"""Reads a box of weights in a dtype, given a function that reads boxes of what is stored."""


@dataclass(frozen=True, slots=True)
class _Coded:
    """A tensor that is stored as others: its full shape, and how a box of it is read."""

    name: str
    shape: tuple[int, ...]
    read: ReadDecoded


class _DecodingReader(RegionReader):
    """Reads boxes of weights; `num_bytes` counts those of codes and scales."""

    def __init__(self, checkpoint: "DecodedCheckpoint", stack: ExitStack) -> None:
        super().__init__(checkpoint.stored, stack)
        self._coded = checkpoint.coded
        self._dtype = checkpoint.dtype

    def read(self, region: Region) -> torch.Tensor:
        if region.name not in self._coded:
            return super().read(region)
        return self._coded[region.name](region, super().read, self._dtype)


@dataclass(frozen=True, slots=True)
class DecodedCheckpoint(CheckpointFiles):
    """A checkpoint of codes, seen as one of weights in `dtype`. Made by `decode_checkpoint`."""

    coded: Mapping[str, ReadDecoded] = field(default_factory=dict)
    """By name, the tensors that are stored as codes."""
    stored: Mapping[str, Path] = field(default_factory=dict)
    """Files of all tensors as they are stored, scales included."""
    dtype: torch.dtype = torch.bfloat16

    @contextmanager
    def reader(self) -> Iterator[RegionReader]:
        """A reader over the files; they are mapped into memory until the block ends."""
        with ExitStack() as stack:
            yield _DecodingReader(self, stack)


def decode_checkpoint(checkpoint: CheckpointFiles, dtype: torch.dtype) -> CheckpointFiles:
    """`checkpoint` with weights in `dtype` in place of codes and scales; itself where it has none.

    Raises `CheckpointMismatch` for codes without scales, scales without codes, and scales of another number.
    """
    coded: dict[str, _Coded] = {}  # by stored name
    specs = {spec.name: spec for spec in checkpoint.specs}
    for codec in (codecs_fp8, codecs_mxfp4):
        for name, shape in codec.find_coded(specs).items():
            coded |= dict.fromkeys(codec.stored_names(name), _Coded(name, shape, codec.read))
    if not coded:
        return checkpoint
    seen: dict[str, TensorSpec] = {}
    files: dict[str, Path] = {}
    for spec in checkpoint.specs:
        if spec.name in coded:
            tensor = coded[spec.name]
            shown = TensorSpec(tensor.name, dtype, tensor.shape)
        else:
            shown = spec
        if shown.name not in seen:
            seen[shown.name], files[shown.name] = shown, checkpoint.files[spec.name]
    readers = {tensor.name: tensor.read for tensor in coded.values()}
    folder, derived, stored = checkpoint.folder, checkpoint.derived, checkpoint.files
    return DecodedCheckpoint(folder, tuple(seen.values()), files, derived, readers, stored, dtype)
