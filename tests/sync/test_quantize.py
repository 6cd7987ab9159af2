"""FP8 codes and scales against arithmetic written out one weight at a time, and boxes against the whole."""

import bisect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.bridges import codecs_fp8
from weightcast.sync.quantize import (
    BLOCK,
    CODES,
    DIVISIONS,
    block_amax,
    grid_box,
    grid_shape,
    quantize,
    scales_of,
    tensor_scales_of,
)

F32 = np.float32
# The finite codes from zero up, 0x00 to 0x7e: their numbers are in order.
MAGNITUDES = torch.arange(0x7F, dtype=torch.uint8).view(CODES).double().tolist()


def nearest_code(value: float) -> int:
    """The number of the code nearest to `value`; of two as near, the even one; saturated."""
    above = bisect.bisect_left(MAGNITUDES, abs(value))
    if above == len(MAGNITUDES):
        best = above - 1
    elif above == 0:
        best = 0
    else:
        down, up = abs(value) - MAGNITUDES[above - 1], MAGNITUDES[above] - abs(value)
        best = above if up < down or (up == down and above % 2 == 0) else above - 1
    return best | (0x80 if np.signbit(value) else 0)


def expected_scale(largest: float, division: str) -> F32:
    """vLLM 0.32, utils/deep_gemm.py, `per_block_cast_to_fp8`: `amax.clamp(1e-4) / fp8_max`.

    A GPU multiplies by the reciprocal of a constant divisor: torch/_inductor/lowering.py `div_prim`, and eagerly
    aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu.
    """
    floored = max(F32(largest), F32(1e-4))
    return floored / F32(448) if division == "cpu" else floored * F32(1 / 448)


def expected_codes(block: torch.Tensor, scale: F32) -> list[list[int]]:
    """`(x * (1.0 / sf)).to(fp8)`, in fp32."""
    reciprocal = F32(1) / scale
    return [[nearest_code(float(F32(value) * reciprocal)) for value in row] for row in block.float().tolist()]


def weights(rows: int, columns: int, seed: int, spread: float = 0.02) -> torch.Tensor:
    """Random bf16 weights."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * spread).bfloat16()


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(weights(128, 128, 1), id="whole"),
        pytest.param(weights(3, 130, 2)[:, :128], id="part-of-a-row"),
        pytest.param(weights(1, 1, 3), id="one"),
        pytest.param(torch.zeros(5, 7).bfloat16(), id="zeros"),
        pytest.param(-torch.zeros(2, 2).bfloat16(), id="negative-zeros"),
        pytest.param(weights(8, 8, 4, 1e-7), id="below-the-floor"),
        pytest.param(torch.tensor([[1e-4, -1e-4, 3e-5]]).bfloat16(), id="about-the-floor"),
        pytest.param(torch.tensor([[1e-40, 0.0]]).bfloat16(), id="subnormal"),
        pytest.param(torch.tensor([[3.3e38, -3.3e38, 1.0]]).bfloat16(), id="huge"),
        pytest.param(weights(16, 16, 5).half(), id="fp16"),
        pytest.param(weights(16, 16, 6).float() + 1e-6, id="fp32"),
    ],
)
def test_a_block_is_what_the_formula_says(block: torch.Tensor, division: str) -> None:
    amax = block_amax(block, (0, 0), BLOCK)
    assert amax.dtype == torch.float32 and amax.shape == (1, 1)
    assert amax.item() == block.float().abs().max().item()
    scales = scales_of(amax, division)
    assert scales.item() == expected_scale(amax.item(), division)
    codes = quantize(block, scales, (0, 0), BLOCK)
    assert codes.dtype == CODES
    assert codes.view(torch.uint8).tolist() == expected_codes(block, F32(scales.item()))


@pytest.mark.parametrize("largest", [1.0, 0.31, 7e-4, 448.0, 1e-20])
def test_a_whole_tensor_divides_truly_and_multiplies_by_the_reciprocal(largest: float) -> None:
    """vLLM 0.32, layers/quantization/online/fp8.py: `_fp8_scale` divides by a tensor, and csrc's
    `static_scaled_fp8_quant` multiplies by `1.0f / scale` and clamps."""
    tensor = weights(40, 300, 7, 1.0)
    tensor = (tensor.float() * (largest / tensor.float().abs().max())).bfloat16()
    amax = block_amax(tensor, (0, 0), (40, 300))
    scales = tensor_scales_of(amax)
    assert scales.item() == F32(amax.item()) / F32(448)
    codes = quantize(tensor, scales, (0, 0), (40, 300))
    assert codes.view(torch.uint8).tolist() == expected_codes(tensor, F32(scales.item()))


def test_a_tensor_of_zeros_is_zeros_with_a_scale_of_one() -> None:
    scales = tensor_scales_of(block_amax(torch.zeros(3, 3).bfloat16(), (0, 0), (3, 3)))
    assert scales.tolist() == [[1.0]]
    assert not quantize(torch.zeros(3, 3).bfloat16(), scales, (0, 0), (3, 3)).view(torch.uint8).any()


def test_nan_and_infinity_show_in_the_largest_weight() -> None:
    tensor = weights(200, 300, 8)
    tensor[130, 5], tensor[0, 299] = float("nan"), float("-inf")
    amax = block_amax(tensor, (0, 0), BLOCK)
    assert torch.isnan(amax).nonzero().tolist() == [[1, 0]]
    assert torch.isinf(amax).nonzero().tolist() == [[0, 2]]


def test_many_rows_are_worked_on_in_slabs_that_change_nothing() -> None:
    """2,100,000 weights are more than a slab, with whole blocks, a row of blocks too wide for one, and one block."""
    for rows, columns, block in ((7000, 300, BLOCK), (300, 7000, BLOCK), (7000, 300, (7000, 300))):
        tensor = weights(rows, columns, 9)
        amax = block_amax(tensor, (0, 0), block)
        padded = torch.nn.functional.pad(tensor, (0, -columns % block[1], 0, -rows % block[0]))
        grid = padded.view(amax.shape[0], block[0], amax.shape[1], block[1])
        assert torch.equal(amax, grid.float().abs().amax((1, 3)))
        scales = scales_of(amax, "gpu")
        plain = (grid.float() * (1.0 / scales)[:, None, :, None]).to(CODES).view(padded.shape)[:rows, :columns]
        assert torch.equal(
            quantize(tensor, scales, (0, 0), block).view(torch.uint8), plain.contiguous().view(torch.uint8)
        )


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """A shape, and the offset and shape of a box of it."""
    shape = (draw(st.integers(1, 400)), draw(st.integers(1, 400)))
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(draw(st.integers(1, full - start)) for full, start in zip(shape, offset, strict=True))
    return shape, (offset[0], offset[1]), (size[0], size[1])


@given(boxes(), st.integers(0, 99))
@PROPERTY
def test_a_box_quantised_by_itself_is_cut_from_the_whole(
    case: tuple[tuple[int, int], tuple[int, int], tuple[int, int]], seed: int
) -> None:
    shape, offset, size = case
    tensor = weights(*shape, seed)
    scales = scales_of(block_amax(tensor, (0, 0), BLOCK), "gpu")
    whole = quantize(tensor, scales, (0, 0), BLOCK)
    box = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
    first, touched = grid_box(offset, size, BLOCK)
    cut = scales[first[0] : first[0] + touched[0], first[1] : first[1] + touched[1]]
    found = quantize(tensor[box], cut, offset, BLOCK)
    assert torch.equal(found.view(torch.uint8), whole[box].contiguous().view(torch.uint8))
    # And the largest weights of the box's blocks, together with those of the rest, are those of the whole.
    rest = tensor.clone()
    rest[box] = 0
    other = block_amax(rest, (0, 0), BLOCK)
    other[first[0] : first[0] + touched[0], first[1] : first[1] + touched[1]].copy_(
        torch.maximum(
            other[first[0] : first[0] + touched[0], first[1] : first[1] + touched[1]],
            block_amax(tensor[box], offset, BLOCK),
        )
    )
    assert torch.equal(other, block_amax(tensor, (0, 0), BLOCK))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 300), st.integers(1, 300))
@PROPERTY
def test_stacked_matrices_are_quantised_each_by_itself(outer: int, experts: int, rows: int, columns: int) -> None:
    stacked = weights(outer * experts * rows, columns, 3).view(outer, experts, rows, columns)
    amax = block_amax(stacked, (0, 0, 0, 0), BLOCK)
    assert amax.shape == grid_shape(tuple(stacked.shape), BLOCK)
    codes = quantize(stacked, scales_of(amax, "gpu"), (0, 0, 0, 0), BLOCK)
    for index in ((0, 0), (outer - 1, experts - 1)):
        alone = block_amax(stacked[index], (0, 0), BLOCK)
        assert torch.equal(amax[index], alone)
        expected = quantize(stacked[index], scales_of(alone, "gpu"), (0, 0), BLOCK)
        assert torch.equal(codes[index].view(torch.uint8), expected.view(torch.uint8))


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1e-6, 1e-2, 10.0]), st.integers(0, 99))
@PROPERTY
def test_what_is_decoded_is_within_half_a_code_of_the_weight(rows: int, columns: int, spread: float, seed: int) -> None:
    """Decoded by the bridge's own reader of FP8 checkpoints."""
    tensor = weights(rows, columns, seed, spread)
    scales = scales_of(block_amax(tensor, (0, 0), BLOCK), "gpu")
    codes = quantize(tensor, scales, (0, 0), BLOCK)
    decoded = codecs_fp8.decode(codes, scales, (0, 0), torch.float32)
    wide = codecs_fp8.decode(torch.ones(rows, columns).to(CODES), scales, (0, 0), torch.float32)
    # Half the distance to the next code: 3 bits behind the leading one, subnormal below 2**-6. The products round too.
    magnitude = (tensor.float() / wide).abs()
    half_code = torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=2.0**-6))) - 4)
    assert bool(((decoded - tensor.float()).abs() <= half_code * wide * (1 + 1e-6) + tensor.float().abs() * 2e-7).all())
