"""Regions tile, chunks cover, and the work is spread."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY
from tests.sync.test_digest import cut

from weightcast.sync.assignment import assign_regions
from weightcast.sync.chunks import ALIGNMENT_BYTES, check_chunk_bytes, lay_out_chunks, split_region
from weightcast.sync.errors import ConfigError, SourceError
from weightcast.sync.regions import Region, TensorSpec, check_unique_names, find_tiling_fault

SHAPES = st.lists(st.integers(0, 12), min_size=0, max_size=4).map(tuple)
DTYPE = st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.float64])


def flat_indices(region: Region, full: torch.Tensor) -> list[int]:
    """The region's elements, in C order, as numbers of the full tensor's elements."""
    indices: list[int] = full[region.slices].reshape(-1).tolist()
    return indices


def number_elements(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose elements are their own numbers."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


@PROPERTY
@given(SHAPES, st.integers(1, 300))
def test_a_split_visits_every_element_in_c_order(shape: tuple[int, ...], max_elements: int) -> None:
    whole = Region("w", (0,) * len(shape), shape)
    parts = list(split_region(whole, max_elements))
    full = number_elements(shape)
    visited = [index for part in parts for index in flat_indices(part, full)]
    assert visited == list(range(whole.numel))
    assert all(0 < part.numel <= max_elements for part in parts)


@PROPERTY
@given(st.lists(st.tuples(SHAPES, DTYPE), max_size=6), st.integers(256, 700))
def test_chunks_hold_every_region_once_in_order(
    tensors: list[tuple[tuple[int, ...], torch.dtype]], sixteenths: int
) -> None:
    chunk_bytes = 16 * sixteenths
    specs = [TensorSpec(str(index), dtype, shape) for index, (shape, dtype) in enumerate(tensors)]
    dtypes = {spec.name: spec.dtype for spec in specs}
    regions = [spec.whole() for spec in specs]
    chunks = lay_out_chunks(regions, dtypes, chunk_bytes)
    assert chunks == lay_out_chunks(list(regions), dict(dtypes), chunk_bytes)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    visited: dict[str, list[int]] = {spec.name: [] for spec in specs}
    full = {spec.name: number_elements(spec.shape) for spec in specs}
    for chunk in chunks:
        end = 0
        for piece in chunk.pieces:
            assert piece.start_byte % ALIGNMENT_BYTES == 0 and 0 <= piece.start_byte - end < ALIGNMENT_BYTES
            assert piece.num_bytes == piece.region.numel * dtypes[piece.region.name].itemsize
            end = piece.start_byte + piece.num_bytes
            visited[piece.region.name] += flat_indices(piece.region, full[piece.region.name])
        assert end == chunk.num_bytes <= chunk_bytes
    assert visited == {spec.name: list(range(spec.numel)) for spec in specs}


@pytest.mark.parametrize("chunk_bytes", [0, -16, 4095, 4096 + 8, (64 << 20) + 16])
def test_chunk_sizes_out_of_range_are_refused(chunk_bytes: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        check_chunk_bytes(chunk_bytes)


@PROPERTY
@given(st.data(), st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple))
def test_any_cut_tiles_and_a_part_less_or_more_does_not(data: st.DataObject, shape: tuple[int, ...]) -> None:
    spec = TensorSpec("w", torch.int8, shape)
    parts = cut(data, spec.whole(), depth=3)
    assert find_tiling_fault(spec, parts) is None
    gone = data.draw(st.sampled_from(parts))
    assert "elements are held" in str(find_tiling_fault(spec, [part for part in parts if part != gone]))
    assert "overlaps" in str(find_tiling_fault(spec, [*parts, gone]))


@pytest.mark.parametrize(
    ("regions", "fault"),
    [
        ([Region("w", (0,), (4,))], "has 1 dimensions, the tensor has 2"),
        ([Region("w", (0, 0, 0), (4, 6))], "offset"),
        ([Region("w", (0, 0), (4, 7))], "outside"),
        ([Region("w", (-1, 0), (4, 6))], "outside"),
        ([Region("w", (0, 0), (4, 4)), Region("w", (0, 3), (4, 3))], "overlaps"),
        ([Region("w", (0, 0), (4, 3)), Region("w", (1, 3), (3, 3))], "21 of 24"),
        ([], "0 of 24"),
        ([Region("w", (0, 0), (4, 3)), Region("w", (0, 3), (4, 3)), Region("w", (2, 2), (0, 3))], None),
    ],
)
def test_faults_of_a_tiling_are_named(regions: list[Region], fault: str | None) -> None:
    got = find_tiling_fault(TensorSpec("w", torch.int8, (4, 6)), regions)
    assert got is None if fault is None else fault in str(got)


def test_an_empty_tensor_needs_no_region() -> None:
    assert find_tiling_fault(TensorSpec("w", torch.int8, (0, 6)), []) is None


@PROPERTY
@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 6))
def test_replicas_are_spread_by_bytes(sizes: list[int], world_size: int) -> None:
    specs = [TensorSpec(str(index), torch.bfloat16, (size,)) for index, size in enumerate(sizes)]
    whole = [spec.whole() for spec in specs]
    served = assign_regions(specs, dict.fromkeys(range(world_size), whole))
    assert sorted(region for regions in served.values() for region in regions) == sorted(whole)
    loads = [sum(2 * region.numel for region in regions) for regions in served.values()]
    assert max(loads) <= min(loads) + 2 * max(sizes)
    for regions in served.values():
        assert [int(region.name) for region in regions] == sorted(int(region.name) for region in regions)


@PROPERTY
@given(st.data())
def test_cut_tensors_go_to_who_holds_them(data: st.DataObject) -> None:
    specs = [TensorSpec("a", torch.int8, (8, 8)), TensorSpec("b", torch.float32, (5,))]
    parts = [part for spec in specs for part in cut(data, spec.whole(), depth=2)]
    holdings = {rank: data.draw(st.lists(st.sampled_from(parts))) for rank in range(3)}
    holdings[3] = parts
    served = assign_regions(specs, holdings)
    assert all(region in holdings[rank] for rank, regions in served.items() for region in regions)
    for spec in specs:
        assert find_tiling_fault(spec, [r for rs in served.values() for r in rs if r.name == spec.name]) is None


@pytest.mark.parametrize(
    ("regions", "names"),
    [
        ([Region("a", (0,), (3,))], "a: 3 of 4"),
        ([Region("a", (0,), (3,)), Region("a", (2,), (2,))], "a: a.0:3. overlaps a.2:4."),
        ([Region("a", (0,), (4,)), Region("z", (0,), (1,))], "z.0:1., which is no tensor"),
        ([Region("a", (0, 1), (4,))], "a: a.offset"),
    ],
)
def test_what_is_no_whole_model_names_the_tensor(regions: list[Region], names: str) -> None:
    with pytest.raises(SourceError, match=names):
        assign_regions([TensorSpec("a", torch.int8, (4,))], {0: regions})


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(SourceError, match="'a' is listed twice"):
        check_unique_names([TensorSpec("a", torch.int8, (4,)), TensorSpec("a", torch.int8, (4,))])
