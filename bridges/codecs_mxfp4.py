"""MXFP4: four-bit codes and a power of two for each 32 of them, as gpt-oss is published.

A matrix W [experts, in, out] is stored the other way round: `W_blocks` [experts, out, in / 32, 16] of uint8, two codes
a byte, the first in the low four bits, and `W_scales` [experts, out, in / 32] of uint8, the exponent plus 127. A weight
is its code's value times two to the exponent (OCP Microscaling Formats 1.0; the same bits as transformers' own
`integrations/mxfp4.py`). `codecs.decode_checkpoint` reads whole checkpoints with these functions.

    weights = read(Region("model.layers.0.mlp.experts.down_proj", (3, 0, 0), (1, 2880, 2880)), reader.read, bfloat16)
"""

from collections.abc import Callable, Mapping

import torch

from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import Region, TensorSpec

BLOCK = 32
"""Weights of one column that share a scale."""
BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
_BLOCK_BYTES = BLOCK // 2
_EXPONENT_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
"""What each of the 16 codes stands for; code 8 is minus zero."""


def decode(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Blocks [..., groups, 16] and scales [..., groups] as weights [..., groups * 32], exact where `dtype` can be."""
    values = torch.tensor(VALUES, device=blocks.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # of each byte: low code, high code
    weights = pairs[blocks.int()].flatten(-2)
    return torch.ldexp(weights, (scales.int() - _EXPONENT_BIAS).unsqueeze(-1)).to(dtype).flatten(-2)


def stored_regions(region: Region) -> tuple[Region, Region]:
    """The blocks and the scales that a box of a matrix [..., in, out] touches."""
    *lead, first_in, first_out = region.offset
    *sizes, num_in, num_out = region.shape
    first = first_in // BLOCK
    groups = -(-(first_in + num_in) // BLOCK) - first
    offset, shape = (*lead, first_out, first), (*sizes, num_out, groups)
    return (
        Region(region.name + BLOCKS_SUFFIX, (*offset, 0), (*shape, _BLOCK_BYTES)),
        Region(region.name + SCALES_SUFFIX, offset, shape),
    )


def stored_names(name: str) -> tuple[str, ...]:
    """The tensors that the matrix `name` is stored as."""
    return (name + BLOCKS_SUFFIX, name + SCALES_SUFFIX)


def read(region: Region, stored: Callable[[Region], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weights of a box [..., in, out], from the blocks and scales that `stored` reads."""
    blocks, scales = stored_regions(region)
    weights = decode(stored(blocks), stored(scales), dtype)
    start = region.offset[-2] % BLOCK
    return weights[..., start : start + region.shape[-2]].mT.contiguous()


def find_coded(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The shapes of the matrices that are stored as MXFP4, by name. Raises `CheckpointMismatch`."""
    parts = {BLOCKS_SUFFIX: SCALES_SUFFIX, SCALES_SUFFIX: BLOCKS_SUFFIX}
    coded: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        suffix = next((suffix for suffix in parts if name.endswith(suffix)), None)
        if suffix is None or spec.dtype != torch.uint8:
            continue
        matrix = name.removesuffix(suffix)
        if matrix + parts[suffix] not in specs:
            raise CheckpointMismatch(
                f"{name} is one half of an MXFP4 matrix, but there is no {matrix}{parts[suffix]}; "
                "download or save the checkpoint again"
            )
        if suffix == BLOCKS_SUFFIX:
            coded[matrix] = _shape(spec, specs[matrix + SCALES_SUFFIX])
    return coded


def _shape(blocks: TensorSpec, scales: TensorSpec) -> tuple[int, ...]:
    """The shape of the matrix that is stored as `blocks` and `scales`."""
    fits = len(blocks.shape) >= 3 and blocks.shape[-1] == _BLOCK_BYTES and blocks.shape[:-1] == scales.shape
    if not fits or scales.dtype != torch.uint8:
        raise CheckpointMismatch(
            f"{blocks.name} of shape {blocks.shape} has scales of {scales.dtype} and shape {scales.shape}; blocks "
            f"[..., out, in / {BLOCK}, {_BLOCK_BYTES}] with uint8 scales [..., out, in / {BLOCK}] are read: "
            "convert the checkpoint to bf16 first"
        )
    *lead, num_out, groups = scales.shape
    return (*lead, groups * BLOCK, num_out)
