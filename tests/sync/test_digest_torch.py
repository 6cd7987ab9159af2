"""Digests in torch operations are those of numpy and of the compiled loops, for every region and dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY, random_bits

from weightcast.sync import Region
from weightcast.sync.digest import BLOCK_LANES, region_digest
from weightcast.sync.digest_torch import as_digest, as_digests, region_sum

DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64)


@PROPERTY
@given(
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=4),
    st.integers(0, 1000),
)
def test_any_region_has_one_digest(dtype: torch.dtype, box: list[tuple[int, int]], seed: int) -> None:
    region = Region("weight", tuple(start for start, _ in box), tuple(size for _, size in box))
    data = random_bits(dtype, region.shape, seed)
    assert as_digest(region_sum(data, region)) == region_digest(data, region)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_many_blocks_and_odd_beginnings(dtype: torch.dtype) -> None:
    lanes_a_row = 2 * BLOCK_LANES + 100
    for start in (0, 1, 3, BLOCK_LANES * 8 // dtype.itemsize - 1):
        region = Region("weight", (7, start), (2, lanes_a_row * 8 // dtype.itemsize + 1))
        data = random_bits(dtype, region.shape, start)
        assert as_digest(region_sum(data, region)) == region_digest(data, region)


def test_views_with_strides_and_offsets() -> None:
    whole = random_bits(torch.bfloat16, (40, 64), 0)
    for data in (whole[:, 3:35], whole.t()[5:21], whole[1:, :], whole.view(-1)[3 : 3 + 640].view(10, 64)):
        region = Region("weight", (2, 8), tuple(data.shape))
        assert as_digest(region_sum(data, region)) == region_digest(data.contiguous(), region)


def test_many_are_read_at_once_and_add_up() -> None:
    region = Region("weight", (0, 0), (6, 5))
    data = random_bits(torch.float32, region.shape, 1)
    cut = [Region("weight", (row, 0), (3, 5)) for row in (0, 3)]
    parts = as_digests([region_sum(data[part.slices], part) for part in cut])
    assert sum(parts) % 2**64 == region_digest(data, region)
    assert as_digests([]) == []
