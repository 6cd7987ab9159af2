"""Codecs: checkpoints whose tensors are stored as codes and scales, read as the weights that they stand for.

DeepSeek V3 and its kin are published in FP8: a matrix W of `float8_e4m3fn` comes with `W_scale_inv`, one fp32 factor
for each block of 128 x 128 entries (fewer at the far edges), and the weight is code times factor. `decode_checkpoint`
gives a checkpoint without the factors, whose reader decodes the boxes that it is asked for and reads no byte besides.
Exports hold the weights in the model's own dtype: code them again with the tool of the engine that wants codes.

    checkpoint = decode_checkpoint(open_checkpoint(folder), torch.bfloat16)
    import_weights(plan, checkpoint)
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader
from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import Region, TensorSpec

BLOCK = 128
"""Rows and columns of a block, `weight_block_size` in the configurations of FP8 checkpoints."""
SCALE_SUFFIX = "_scale_inv"
CODES = torch.float8_e4m3fn


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of a matrix of `shape` along each dimension; those at the far edges may be smaller."""
    return tuple(-(-size // BLOCK) for size in shape)


def scale_region(region: Region) -> Region:
    """The factors of the blocks that a box of a matrix touches, in the matrix of factors."""
    first = tuple(at // BLOCK for at in region.offset)
    last = scale_shape(tuple(at + size for at, size in zip(region.offset, region.shape, strict=True)))
    shape = tuple(stop - start for start, stop in zip(first, last, strict=True))
    return Region(region.name + SCALE_SUFFIX, first, shape)


def decode(codes: torch.Tensor, scales: torch.Tensor, offset: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The weights of a box at `offset` of a matrix: [rows, columns] of FP8 codes and the factors of its `scale_region`.

    Multiplied in fp32 and rounded once, as DeepSeek's own conversion does.
    """
    weights = codes.float()
    for dim, (at, size) in enumerate(zip(offset, codes.shape, strict=True)):
        blocks = torch.arange(at, at + size, device=codes.device) // BLOCK - at // BLOCK
        scales = scales.index_select(dim, blocks)
    return (weights * scales).to(dtype)


def encode(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and factors of a whole matrix, each block's largest entry at the largest code; a block of zeros has 1.0."""
    largest_code = torch.finfo(CODES).max
    rows, columns = weights.shape
    scales = torch.ones(scale_shape((rows, columns)), device=weights.device)
    codes = torch.empty(weights.shape, dtype=CODES, device=weights.device)
    for block_row in range(scales.shape[0]):
        for block_column in range(scales.shape[1]):
            box = (
                slice(block_row * BLOCK, (block_row + 1) * BLOCK),
                slice(block_column * BLOCK, (block_column + 1) * BLOCK),
            )
            block = weights[box].float()
            largest = block.abs().max()
            if largest > 0:
                scales[block_row, block_column] = largest / largest_code
            codes[box] = (block / scales[block_row, block_column]).to(CODES)
    return codes, scales


class _DecodingReader(RegionReader):
    """Reads boxes of weights; `num_bytes` counts those of codes and factors."""

    def __init__(self, checkpoint: "DecodedCheckpoint", stack: ExitStack) -> None:
        super().__init__(checkpoint.stored, stack)
        self._coded = checkpoint.coded
        self._dtype = checkpoint.dtype

    def read(self, region: Region) -> torch.Tensor:
        data = super().read(region)
        if region.name not in self._coded:
            return data
        return decode(data, super().read(scale_region(region)), region.offset, self._dtype)


@dataclass(frozen=True, slots=True)
class DecodedCheckpoint(CheckpointFiles):
    """A checkpoint of codes, seen as one of weights in `dtype`. Made by `decode_checkpoint`."""

    coded: frozenset[str] = frozenset()
    """Names of the tensors that are stored as codes."""
    stored: Mapping[str, Path] = field(default_factory=dict)
    """Files of all tensors as they are stored, factors included."""
    dtype: torch.dtype = torch.bfloat16

    @contextmanager
    def reader(self) -> Iterator[RegionReader]:
        """A reader over the files; they are mapped into memory until the block ends."""
        with ExitStack() as stack:
            yield _DecodingReader(self, stack)


def decode_checkpoint(checkpoint: CheckpointFiles, dtype: torch.dtype) -> CheckpointFiles:
    """`checkpoint` with weights in `dtype` in place of FP8 codes and factors; itself where it has none.

    Raises `CheckpointMismatch` for codes without factors, factors without codes, and factors of another number.
    """
    specs = {spec.name: spec for spec in checkpoint.specs}
    coded = frozenset(name for name, spec in specs.items() if name + SCALE_SUFFIX in specs)
    for name, spec in specs.items():
        _check(name, spec, coded, specs)
    if not coded:
        return checkpoint
    scales = {name + SCALE_SUFFIX for name in coded}
    seen = tuple(
        TensorSpec(name, dtype, spec.shape) if name in coded else spec
        for name, spec in specs.items()
        if name not in scales
    )
    files = {spec.name: checkpoint.files[spec.name] for spec in seen}
    return DecodedCheckpoint(checkpoint.folder, seen, files, checkpoint.derived, coded, checkpoint.files, dtype)


def _check(name: str, spec: TensorSpec, coded: frozenset[str], specs: Mapping[str, TensorSpec]) -> None:
    if spec.dtype == CODES and name not in coded:
        raise CheckpointMismatch(
            f"{name} holds FP8 codes, but there are no factors {name}{SCALE_SUFFIX}; only codes with a factor for each "
            f"block of {BLOCK} x {BLOCK} are read: convert the checkpoint to bf16 first"
        )
    if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) not in specs:
        raise CheckpointMismatch(f"{name} are factors of no tensor; download or save the checkpoint again")
    if name in coded:
        got = specs[name + SCALE_SUFFIX].shape
        if spec.dtype != CODES or len(spec.shape) != 2 or got != scale_shape(spec.shape):
            raise CheckpointMismatch(
                f"{name} of {spec.dtype} and shape {spec.shape} has factors of shape {got}; a matrix of {CODES} with "
                f"factors of shape {scale_shape(spec.shape)} (blocks of {BLOCK} x {BLOCK}) is read: convert the "
                "checkpoint to bf16 first"
            )
