"""FP8 in blocks: a matrix W of `float8_e4m3fn` and `W_scale_inv`, as DeepSeek V3 and its kin are published.

There is one fp32 factor for each block of 128 x 128 entries (fewer at the far edges), and the weight is code times
factor. `codecs.decode_checkpoint` reads whole checkpoints with these functions.

    weights = read(region, reader.read, torch.bfloat16)
"""

from collections.abc import Callable, Mapping, Set

import torch

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


def stored_names(name: str) -> tuple[str, ...]:
    """The tensors that the matrix `name` is stored as."""
    return (name, name + SCALE_SUFFIX)


def read(region: Region, stored: Callable[[Region], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weights of a box, from the codes and factors that `stored` reads."""
    return decode(stored(region), stored(scale_region(region)), region.offset, dtype)


def find_coded(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The shapes of the matrices that are stored as FP8 codes, by name. Raises `CheckpointMismatch`."""
    coded = {name: spec.shape for name, spec in specs.items() if name + SCALE_SUFFIX in specs}
    for name, spec in specs.items():
        _check(name, spec, coded.keys(), specs)
    return coded


def _check(name: str, spec: TensorSpec, coded: Set[str], specs: Mapping[str, TensorSpec]) -> None:
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
