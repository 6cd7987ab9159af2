"""FP8 codes and scales of weights, as an engine makes them when it quantises bf16 itself. Pure.

A tensor is cut into blocks along its last two dimensions (128 x 128, or the whole matrix for one scale a tensor);
dimensions before them (experts) have blocks of their own. A block's scale follows from its largest magnitude, and the
weight is code times scale. A box of the tensor is quantised by itself, wherever it is cut, once the largest
magnitudes of the blocks that it touches are known.

    amax = block_amax(weights, offset=(0, 0), block=BLOCK)
    scales = scales_of(amax, DIVIDE_ON_GPU)
    codes = quantize(weights, scales, offset=(0, 0), block=BLOCK)

The arithmetic is that of vLLM 0.32: `per_block_cast_to_fp8` (utils/deep_gemm.py) and `Fp8PerTensorOnlineLinearMethod`
with the kernel `static_scaled_fp8_quant` (layers/quantization/online/fp8.py). All of it is elementwise fp32 with one
rounding a step, so that every device makes the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

CODES = torch.float8_e4m3fn
MAX_CODE = 448.0
BLOCK = (128, 128)
# DeepGEMM's floor: a block of smaller weights gets the scale of this one.
MIN_BLOCK_AMAX = 1e-4
# The smallest magnitude with a normal fp32 scale, whose reciprocal is finite; whole tensors below it are refused.
MIN_TENSOR_AMAX = MAX_CODE * torch.finfo(torch.float32).tiny

DIVIDE_ON_GPU = "gpu"
"""`amax / 448.0` as CUDA computes it: torch, eager or compiled, multiplies by fp32(1 / 448) for a Python number."""
DIVIDE_ON_CPU = "cpu"
"""`amax / 448.0` as a CPU computes it: a true division."""
DIVISIONS = (DIVIDE_ON_GPU, DIVIDE_ON_CPU)

# Elements worked on at once: what stays in a core's cache, and what keeps a GPU busy.
_SLAB_ELEMENTS = {"cpu": 1 << 19}
_SLAB_ELEMENTS_GPU = 1 << 26

Shape = tuple[int, ...]
Block = tuple[int, int]


def grid_shape(shape: Shape, block: Block) -> Shape:
    """Blocks of a tensor of `shape` (two dimensions or more) along each dimension; those at the far edges may be
    smaller."""
    rows, columns = shape[-2:]
    return (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))


def grid_box(offset: Shape, shape: Shape, block: Block) -> tuple[Shape, Shape]:
    """Offset and shape, in the tensor's grid of blocks, of the blocks that a box touches."""
    first = (*offset[:-2], offset[-2] // block[0], offset[-1] // block[1])
    ends = [-(-(offset[d] + shape[d]) // block[d]) for d in (-2, -1)]
    return first, (*shape[:-2], ends[0] - first[-2], ends[1] - first[-1])


def on_block_borders(offset: Shape, shape: Shape, full: Shape, block: Block) -> bool:
    """Whether a box of a tensor of shape `full` splits no block."""
    return all(
        offset[d] % block[d] == 0 and ((offset[d] + shape[d]) % block[d] == 0 or offset[d] + shape[d] == full[d])
        for d in (-2, -1)
    )


def block_amax(weights: torch.Tensor, offset: Shape, block: Block) -> torch.Tensor:
    """Largest magnitudes, fp32, in a box at `offset`, one a block that it touches. NaN where a weight is NaN."""
    if weights.dim() > 2:
        return torch.stack([block_amax(part, offset[1:], block) for part in weights])
    shape = grid_box(offset, tuple(weights.shape), block)[1]
    grid = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    edges = (offset[1] % block[1], -(offset[1] + weights.shape[1]) % block[1])
    # A whole row of columns is one block of its own width, so nothing is padded to the width of a matrix.
    padding = edges if shape[1] > 1 else (0, 0)
    for slab in _slabs(weights, offset[0], block[0]):
        rows = torch.unflatten(weights[slab.rows], 0, (slab.num_blocks, -1))
        # Rows first: columns lie side by side, and are compared many at a time.
        largest = torch.maximum(rows.amax(1), -rows.amin(1)).float()
        largest = torch.unflatten(torch.nn.functional.pad(largest, padding), 1, (shape[1], -1)).amax(2)
        grid[slab.blocks] = torch.maximum(grid[slab.blocks], largest)
    return grid


def scales_of(amax: torch.Tensor, division: str) -> torch.Tensor:
    """Scales of 128 x 128 blocks with these largest magnitudes. `division` is the engine's (`DIVISIONS`)."""
    floored = amax.float().clamp(min=MIN_BLOCK_AMAX)
    if division == DIVIDE_ON_GPU:
        return floored * torch.tensor(1.0 / MAX_CODE, dtype=torch.float32, device=amax.device)
    return floored / torch.tensor(MAX_CODE, dtype=torch.float32, device=amax.device)


def tensor_scales_of(amax: torch.Tensor) -> torch.Tensor:
    """Scales of whole tensors with these largest magnitudes; a tensor of zeros has 1.0.

    vLLM gives it the scale 0, and codes of 448 or NaN as the kernel happens to treat 0 x infinity.
    """
    scales = amax.float() / torch.tensor(MAX_CODE, dtype=torch.float32, device=amax.device)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def quantize(weights: torch.Tensor, scales: torch.Tensor, offset: Shape, block: Block) -> torch.Tensor:
    """Codes of a box at `offset`. `scales` has one entry a block that it touches (`grid_box`)."""
    codes = torch.empty(weights.shape, dtype=CODES, device=weights.device)
    if weights.dim() > 2:
        for part, part_codes, part_scales in zip(weights, codes, scales, strict=True):
            part_codes.copy_(quantize(part, part_scales, offset[1:], block))
        return codes
    columns = torch.arange(offset[1], offset[1] + weights.shape[1], device=weights.device) // block[1]
    reciprocals = (1.0 / scales).index_select(1, columns - offset[1] // block[1])
    for slab in _slabs(weights, offset[0], block[0]):
        wide = torch.unflatten(weights[slab.rows].to(torch.float32, copy=True), 0, (slab.num_blocks, -1))
        wide.mul_(reciprocals[slab.blocks].unsqueeze(1)).clamp_(-MAX_CODE, MAX_CODE)
        codes[slab.rows].copy_(wide.flatten(0, 1))
    return codes


@dataclass(frozen=True, slots=True)
class _Slab:
    """Rows of a matrix, and the blocks of the touched grid that they lie in, each with equally many of them."""

    rows: slice
    blocks: slice

    @property
    def num_blocks(self) -> int:
        return int(self.blocks.stop - self.blocks.start)


def _slabs(weights: torch.Tensor, first_row: int, block_rows: int) -> Iterator[_Slab]:
    """Cut the rows of a box that begins at `first_row` of its matrix, at block borders and into bearable sizes."""
    num_rows, num_columns = weights.shape
    limit = max(1, _SLAB_ELEMENTS.get(weights.device.type, _SLAB_ELEMENTS_GPU) // max(1, num_columns))
    row = 0
    while row < num_rows:
        index = (first_row + row) // block_rows - first_row // block_rows
        left = block_rows - (first_row + row) % block_rows
        num_whole = min(limit, num_rows - row) // block_rows if left == block_rows else 0
        if num_whole > 1:
            step, num_blocks = num_whole * block_rows, num_whole
        else:
            step, num_blocks = min(left, limit, num_rows - row), 1
        yield _Slab(slice(row, row + step), slice(index, index + num_blocks))
        row += step
