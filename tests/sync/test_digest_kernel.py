"""The compiled digest: numpy's values at every level, and a copy of every bit where it copies."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY, bits

from weightcast.sync import digest as digest_module
from weightcast.sync.digest import copy_with_digest, region_digest
from weightcast.sync.digest_kernel import NUMPY, available_levels
from weightcast.sync.regions import DTYPES, Region

LEVELS = available_levels()
MANY = settings(PROPERTY, max_examples=300)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """A region anywhere in a tensor; last dimensions from one element to many vectors."""
    outer = draw(st.lists(st.integers(1, 5), max_size=3))
    last = draw(st.one_of(st.integers(1, 70), st.integers(500, 700)))
    shape = (*outer, last) if draw(st.integers(0, 9)) else ()
    offset = tuple(draw(st.integers(0, 1 << 20)) for _ in shape)
    return Region("w", offset, shape)


@st.composite
def tensors(draw: st.DrawFn, region: Region, dtype: torch.dtype, contiguous: bool = False) -> torch.Tensor:
    """Random bits of the region's shape, at any address, with gaps between slices of the outer dimensions."""
    last = region.shape[-1] if region.shape else 1
    outer = region.shape[:-1]
    pitches: list[int] = []
    used = last
    for size in reversed(outer):
        pitch = used + (0 if contiguous else draw(st.integers(0, 9)))
        pitches.insert(0, pitch)
        used = pitch * size
    start_byte = draw(st.integers(0, 64))
    raw = np.random.default_rng(draw(st.integers(0, 999))).integers(
        0, 2 if dtype is torch.bool else 256, start_byte + used * dtype.itemsize, np.uint8
    )
    flat = torch.from_numpy(raw[start_byte:]).view(dtype)
    return flat.as_strided(region.shape, (*pitches, 1) if region.shape else ())


@pytest.mark.parametrize("level", LEVELS[1:])
@MANY
@given(st.data(), regions(), st.sampled_from(sorted(DTYPES)))
def test_every_level_has_numpys_values(level: str, data: st.DataObject, region: Region, dtype: str) -> None:
    tensor = data.draw(tensors(region, DTYPES[dtype], contiguous=True))
    assert region_digest(tensor, region, level=level) == region_digest(tensor, region, level=NUMPY)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("min_stream_bytes", [0, 1 << 40])
@MANY
@given(st.data(), regions(), st.sampled_from(sorted(DTYPES)))
def test_a_copy_brings_every_bit_and_has_the_digest_of_it(
    level: str, min_stream_bytes: int, data: st.DataObject, region: Region, dtype: str
) -> None:
    source = data.draw(tensors(region, DTYPES[dtype]))
    target = data.draw(tensors(region, DTYPES[dtype]))
    whole = whole_memory(target)
    outside = whole.clone()
    view_like(outside, target).copy_(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_module, "MIN_STREAM_BYTES", min_stream_bytes)
        got = copy_with_digest(target, source, region, level=level)
    assert got == region_digest(source.contiguous(), region, level=NUMPY)
    assert torch.equal(bits(target.contiguous()), bits(source.contiguous()))
    assert torch.equal(whole, outside), "memory beside the target was written"


def whole_memory(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that a tensor is a view of, from its first element on."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def view_like(raw: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The view of `raw` that `tensor` is of its own memory."""
    return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("start", [0, 3, (1 << 18) - 5, (1 << 18) + 1])
def test_rows_of_several_blocks(level: str, start: int) -> None:
    source = torch.from_numpy(np.random.default_rng(start).integers(0, 256, (2, (1 << 19) + 77), np.uint8))
    region = Region("w", (4, start), tuple(source.shape))
    target = torch.zeros(2, source.shape[1] + 8, dtype=torch.uint8)[:, 8:]
    expected = region_digest(source, region, level=NUMPY)
    assert region_digest(source, region, level=level) == expected
    for reread in (False, True):
        target.zero_()
        assert copy_with_digest(target, source, region, reread=reread, level=level) == expected
        assert torch.equal(target, source)


@pytest.mark.parametrize("level", LEVELS)
def test_what_no_loop_can_walk_over_is_copied_by_torch(level: str) -> None:
    numbers = torch.arange(12.0).view(3, 4)
    region = Region("w", (1, 2), (4, 3))
    expected = region_digest(numbers.T.contiguous(), region, level=NUMPY)
    target = torch.zeros(4, 3)
    assert copy_with_digest(target, numbers.T, region, level=level) == expected
    assert torch.equal(target, numbers.T)
    rows = torch.zeros(3, 4)
    assert copy_with_digest(rows.T, numbers.T.contiguous(), region, level=level) == expected
    assert torch.equal(rows, numbers)
    half = torch.zeros(4, 3, dtype=torch.bfloat16)
    assert copy_with_digest(half, numbers.T, region, level=level) == region_digest(half, region, level=NUMPY)
    assert torch.equal(half, numbers.T.bfloat16())


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_and_parameters_are_copied_too(level: str) -> None:
    empty = torch.empty(0, 3)
    assert copy_with_digest(empty, empty.clone(), Region("w", (0, 0), (0, 3)), level=level) == 0
    parameter = torch.nn.Parameter(torch.zeros(5))
    source = torch.arange(5.0, requires_grad=True)
    region = Region("w", (7,), (5,))
    assert copy_with_digest(parameter, source, region, level=level) == region_digest(source, region, level=NUMPY)
    assert torch.equal(parameter, source)


def test_the_kernel_is_built_where_there_is_a_compiler() -> None:
    assert len(LEVELS) > 1 or shutil.which("cc") is None
