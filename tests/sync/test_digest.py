"""Digests add up over any cut, and see what changed."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY, bits, random_bits

from weightcast.sync.digest import add_digests, region_digest
from weightcast.sync.regions import DTYPES, Region, TensorSpec

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)
NAMES = st.sampled_from(sorted(DTYPES))


def digest(tensor: torch.Tensor) -> int:
    """Of a whole tensor."""
    return region_digest(tensor, TensorSpec("w", tensor.dtype, tuple(tensor.shape)).whole())


def cut(data: st.DataObject, region: Region, depth: int) -> list[Region]:
    """Cut a region in two along any axis, and the halves again."""
    axes = [axis for axis, size in enumerate(region.shape) if size > 1]
    if not axes or depth == 0:
        return [region]
    axis = data.draw(st.sampled_from(axes))
    at = data.draw(st.integers(1, region.shape[axis] - 1))
    low, high = list(region.shape), list(region.shape)
    low[axis], high[axis] = at, region.shape[axis] - at
    offset = list(region.offset)
    offset[axis] += at
    halves = [Region(region.name, region.offset, tuple(low)), Region(region.name, tuple(offset), tuple(high))]
    return [part for half in halves for part in cut(data, half, depth - 1)]


@PROPERTY
@given(st.data(), NAMES, SHAPES, st.integers(0, 99))
def test_the_digests_of_any_cut_add_up(data: st.DataObject, dtype: str, shape: tuple[int, ...], seed: int) -> None:
    tensor = random_bits(DTYPES[dtype], shape, seed)
    parts = cut(data, TensorSpec("w", tensor.dtype, shape).whole(), depth=3)
    assert add_digests(*(region_digest(tensor[r.slices].contiguous(), r) for r in parts)) == digest(tensor)


@PROPERTY
@given(st.data(), NAMES, SHAPES, st.integers(0, 99))
def test_one_flipped_bit_is_seen(data: st.DataObject, dtype: str, shape: tuple[int, ...], seed: int) -> None:
    tensor = random_bits(DTYPES[dtype], shape, seed)
    before = digest(tensor)
    altered = bits(tensor).clone()
    place = data.draw(st.integers(0, len(altered) - 1))
    bit = 0 if tensor.dtype is torch.bool else data.draw(st.integers(0, 7))
    altered[place] ^= 1 << bit
    assert digest(altered.view(tensor.dtype).view(shape)) != before


@PROPERTY
@given(st.data(), NAMES, st.lists(st.integers(2, 7), min_size=1, max_size=3).map(tuple), st.integers(0, 99))
def test_two_swapped_slices_are_seen(data: st.DataObject, dtype: str, shape: tuple[int, ...], seed: int) -> None:
    tensor = random_bits(DTYPES[dtype], shape, seed)
    axis = data.draw(st.integers(0, len(shape) - 1))
    a, b = sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=2, max_size=2)))
    order = list(range(shape[axis]))
    order[a], order[b] = b, a
    swapped = torch.stack([tensor.select(axis, index) for index in order], axis)
    same = torch.equal(bits(swapped), bits(tensor))
    assert (digest(swapped) == digest(tensor)) == same


def test_swapped_lanes_blocks_and_dimensions_are_seen() -> None:
    row = random_bits(torch.uint8, (1 << 19,), 1)
    half = len(row) // 2
    assert digest(torch.cat([row[half:], row[:half]])) != digest(row)
    square = random_bits(torch.bfloat16, (8, 8), 2)
    assert digest(square.T.contiguous()) != digest(square)
    assert digest(square.view(4, 16)) != digest(square)


def test_rows_longer_than_a_table_of_weights_add_up() -> None:
    tensor = random_bits(torch.uint8, (2, (1 << 18) + 1003), 3)
    parts = [Region("w", (0, 0), (2, 100_003)), Region("w", (0, 100_003), (2, tensor.shape[1] - 100_003))]
    assert add_digests(*(region_digest(tensor[r.slices].contiguous(), r) for r in parts)) == digest(tensor)


@PROPERTY
@given(NAMES)
def test_an_empty_tensor_has_digest_zero(dtype: str) -> None:
    assert digest(torch.empty(0, 3, dtype=DTYPES[dtype])) == 0
    assert digest(torch.zeros(3, 3, dtype=DTYPES[dtype])) == 0


@PROPERTY
@given(
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    st.integers(1, 20),
)
def test_small_whole_tensors_have_the_sum_of_their_rows(dtype: torch.dtype, lead: tuple[int, ...], lanes: int) -> None:
    """The table for small tensors against the general way, which regions that do not begin at zero still go."""
    spec = TensorSpec("t", dtype, (*lead, lanes * 8 // dtype.itemsize))
    data = random_bits(dtype, spec.shape, 3)
    parts = [Region("t", (*index, 0), (*(1 for _ in lead), spec.shape[-1])) for index in np.ndindex(*lead)]
    sums = [region_digest(data[part.slices].contiguous(), part) for part in parts]
    assert region_digest(data, spec.whole()) == add_digests(*sums)
    if lead:
        moved = Region("t", (1, *(0 for _ in lead)), spec.shape)
        assert region_digest(data, moved) != region_digest(data, spec.whole())
