"""Batches of an export: any holdings, any receivers and any limit give whole tensors, and no more memory than allowed.

The ranks are played one after the other in this process, with the collectives' effect in plain copies.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.bridges.export_batches import Batch, cut_region, plan_batches
from weightcast.bridges.parcels import LiveRegions
from weightcast.bridges.stream_slices import ALIGNMENT_BYTES, Slices, slice_streams
from weightcast.sync.errors import ConfigError, SourceError
from weightcast.sync.regions import HeldRegion, Region, TensorSpec, find_tiling_fault

WORLD_SIZE = 5
Holdings = dict[int, tuple[Region, ...]]


def join(slices: Slices, streams: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """What `exchange.join_streams` leaves on every receiver."""
    slots = {}
    for receiver in slices.receivers:
        slot = torch.zeros(slices.slot_bytes, dtype=torch.uint8)
        kept = slices.kept_bytes(receiver)
        slot[:kept] = streams.get(receiver, slot)[:kept]
        place = kept
        for source, count in enumerate(slices.received_bytes(receiver, WORLD_SIZE)):
            sent = slices.sent_bytes(source, WORLD_SIZE)
            assert sent[receiver] == count
            start = slices.kept_bytes(source) + sum(sent[:receiver])
            slot[place : place + count] = streams[source][start : start + count] if count else 0
            place += count
        slots[receiver] = slot
    return torch.cat(list(slots.values()))


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, WORLD_SIZE - 1), st.integers(0, 20), min_size=1),
    st.sets(st.integers(0, WORLD_SIZE - 1), min_size=1),
)
def test_levelled_streams_can_be_read_back(units: dict[int, int], receivers: set[int]) -> None:
    streams = {
        rank: torch.randint(0, 255, (count * ALIGNMENT_BYTES,), dtype=torch.uint8)
        for rank, count in sorted(units.items())
    }
    slices = slice_streams({rank: len(stream) for rank, stream in streams.items()}, sorted(receivers))
    total = sum(len(stream) for stream in streams.values())
    assert total <= slices.total_bytes < total + ALIGNMENT_BYTES * len(receivers)
    joined = join(slices, streams)
    for rank, stream in streams.items():
        assert sum(slices.sent_bytes(rank, WORLD_SIZE)) + slices.kept_bytes(rank) == len(stream)
        for start, stop in ((0, len(stream)), (len(stream) // 3, len(stream) // 2)):
            if start < stop:
                assert torch.equal(slices.read(joined, rank, start, stop - start), stream[start:stop])


@pytest.mark.parametrize(
    ("stream_bytes", "receivers", "moved_bytes"),
    [
        ({0: 64, 1: 64, 2: 64, 3: 64}, (0, 1, 2, 3), 0),  # tensor parallel: level already, one collective
        ({0: 128, 1: 128}, (0, 1, 2, 3), 128),  # one pipeline stage: half of it is handed on first
        ({0: 128, 1: 128}, (3,), 256),
        ({0: 128, 1: 128}, (0,), 128),
    ],
)
def test_only_what_is_uneven_is_moved_twice(
    stream_bytes: dict[int, int], receivers: tuple[int, ...], moved_bytes: int
) -> None:
    slices = slice_streams(stream_bytes, receivers)
    assert sum(sum(slices.sent_bytes(rank, WORLD_SIZE)) for rank in stream_bytes) == moved_bytes
    assert slices.are_level == (moved_bytes == 0)


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


def peak_bytes(batch: Batch, rank: int, unfinished_bytes: int) -> int:
    """The most that a rank has in flight in a batch, as `export_batches` counts it."""
    stream = batch.parcels[rank].num_bytes if rank in batch.parcels else 0
    if rank not in batch.slices.receivers:
        return stream
    slot, joined = batch.slices.slot_bytes, batch.slices.total_bytes
    spread = 0 if len(batch.slices.receivers) == 1 else 2 * joined
    largest = max(spec.num_bytes for spec in batch.specs)
    places = [place for rows in batch.places().values() for place in rows]
    apart = max((place.region.numel * 4 for place in places), default=0) if spread else 0
    filling = joined + min(apart, joined) + (0 if unfinished_bytes else largest)
    return unfinished_bytes + max(stream + slot, slot + spread, filling)


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
    for batch in plan_batches(specs, holdings, sorted(receivers), limit_bytes):
        unfinished = sum(t.nbytes for t in tensors.values())
        for rank in range(WORLD_SIZE):
            assert peak_bytes(batch, rank, unfinished) <= max(limit_bytes, largest + limit_bytes // 4)
        streams = {rank: parcel.pack(live[rank], torch.device("cpu")) for rank, parcel in batch.parcels.items()}
        joined = join(batch.slices, streams)
        for spec in batch.specs:
            tensor = tensors.pop(spec.name, torch.zeros(spec.shape, dtype=spec.dtype))
            for region in batch.local.get(spec.name, ()):
                assert all(region in holdings[rank] for rank in receivers)
                tensor[region.slices] = full[spec.name][region.slices]
            for place in batch.places()[spec.name]:
                num_bytes = place.region.numel * spec.dtype.itemsize
                raw = batch.slices.read(joined, place.source, place.start_bytes, num_bytes)
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
