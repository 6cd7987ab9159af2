"""Batches of an export: any holdings, any receivers and any limit give whole tensors, and no more memory than allowed.

The ranks are played one after the other in this process, with the collectives' effect in plain copies.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.bridges.export_batches import Batch, cut_region, plan_batches
from weightcast.bridges.parcels import LiveRegions
from weightcast.sync.errors import ConfigError, SourceError
from weightcast.sync.regions import HeldRegion, Region, TensorSpec, find_tiling_fault

WORLD_SIZE = 5
Holdings = dict[int, tuple[Region, ...]]


def join(batch: Batch, live: Mapping[int, LiveRegions]) -> torch.Tensor:
    """What `exchange.join_parcels` leaves on every receiver."""
    streams = [parcel.pack(live[rank], torch.device("cpu")) for rank, parcel in batch.parcels.items()]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *streams])


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=3), st.integers(1, 30))
def test_pieces_of_a_region_tile_it(shape: list[int], max_numel: int) -> None:
    spec = TensorSpec("t", torch.float32, tuple(shape))
    pieces = list(cut_region(spec.whole(), max_numel))
    assert find_tiling_fault(spec, pieces) is None and all(piece.numel <= max_numel for piece in pieces)


@st.composite
def models(draw: st.DrawFn) -> tuple[tuple[TensorSpec, ...], Holdings]:
    """Tensors of some kilobytes, each cut along a dimension, each part held by some ranks."""
    specs: list[TensorSpec] = []
    holdings: dict[int, list[Region]] = {rank: [] for rank in range(WORLD_SIZE)}
    for number in range(draw(st.integers(1, 8))):
        shape = draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
        spec = TensorSpec(f"t{number}", draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8])), shape)
        specs.append(spec)
        dim, num_parts = draw(st.integers(0, 1)), draw(st.integers(1, 3))
        borders = [shape[dim] * part // num_parts for part in range(num_parts + 1)]
        for start, stop in itertools.pairwise(borders):
            offset, size = [0, 0], list(shape)
            offset[dim], size[dim] = start, stop - start
            for rank in draw(st.sets(st.integers(0, WORLD_SIZE - 1), min_size=1)):
                holdings[rank].append(Region(spec.name, tuple(offset), tuple(size)))
    return tuple(specs), {rank: tuple(regions) for rank, regions in holdings.items()}


def peak_bytes(run: Sequence[Batch], rank: int) -> int:
    """The most that a rank has in flight in batches that share their buffer, as `export_batches` counts it."""
    if rank not in run[0].receivers:
        return max(batch.parcels[rank].num_bytes if rank in batch.parcels else 0 for batch in run)
    return max(batch.num_bytes for batch in run) + max(spec.num_bytes for batch in run for spec in batch.specs)


@settings(deadline=None, max_examples=60)
@given(models(), st.sets(st.integers(0, WORLD_SIZE - 1), min_size=1), st.integers(2**16, 2**20))
def test_batches_make_whole_tensors_within_the_limit(
    model: tuple[tuple[TensorSpec, ...], Holdings], receivers: set[int], limit_bytes: int
) -> None:
    specs, holdings = model
    full = {spec.name: torch.randint(0, 100, spec.shape).to(spec.dtype) for spec in specs}
    live = {
        rank: LiveRegions(HeldRegion(r, partial(lambda r: full[r.name][r.slices], r)) for r in regions)
        for rank, regions in holdings.items()
    }
    largest = max(spec.num_bytes for spec in specs)
    order: list[str] = []
    tensors: dict[str, torch.Tensor] = {}
    batches = plan_batches(specs, holdings, sorted(receivers), limit_bytes)
    for _, run in groupby(batches, key=lambda batch: batch.piece_of):
        same = tuple(run)
        for rank in range(WORLD_SIZE):
            assert peak_bytes(same, rank) <= max(limit_bytes, largest + limit_bytes // 4)
    for batch in batches:
        joined = join(batch, live)
        for spec in batch.specs:
            tensor = tensors.pop(spec.name, torch.zeros(spec.shape, dtype=spec.dtype))
            for region in batch.local.get(spec.name, ()):
                assert all(region in holdings[rank] for rank in receivers)
                tensor[region.slices] = full[spec.name][region.slices]
            for place in batch.places()[spec.name]:
                num_bytes = place.region.numel * spec.dtype.itemsize
                raw = joined[place.start_bytes : place.start_bytes + num_bytes]
                tensor[place.region.slices] = raw.view(spec.dtype).view(place.region.shape)
            if batch.completes:
                assert torch.equal(tensor, full[spec.name])
                order.append(spec.name)
            else:
                tensors[spec.name] = tensor
    assert order == [spec.name for spec in specs] and not tensors


def test_replicas_send_once_and_share_the_work() -> None:
    specs = [TensorSpec(f"t{number}", torch.float32, (1024,)) for number in range(8)]
    everything = tuple(spec.whole() for spec in specs)
    holdings: dict[int, Sequence[Region]] = {0: (), 1: everything, 2: everything, 3: everything}
    (batch,) = plan_batches(specs, holdings, [0], 2**20)
    assert [parcel.num_bytes for parcel in batch.parcels.values()] == [3 * 4096, 3 * 4096, 2 * 4096]
    assert sorted(region for parcel in batch.parcels.values() for region in parcel.regions) == sorted(everything)
    # What every receiver holds does not travel; what one of them holds, it sends itself.
    (batch,) = plan_batches(specs, holdings, [1, 2], 2**20)
    assert not batch.parcels and sum(len(rows) for rows in batch.local.values()) == 8
    (batch,) = plan_batches(specs, holdings, [0, 3], 2**20)
    assert list(batch.parcels) == [3]


def test_what_cannot_be_exported_is_refused() -> None:
    specs = [TensorSpec("a", torch.float32, (4,))]
    with pytest.raises(SourceError, match="a: 2 of 4 elements are held"):
        plan_batches(specs, {0: (Region("a", (0,), (2,)),)}, [0], 2**20)
    with pytest.raises(ConfigError, match="max_in_flight_bytes=100; give at least 65536"):
        plan_batches(specs, {0: (specs[0].whole(),)}, [0], 100)
