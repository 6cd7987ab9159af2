"""Runs of chunks in host memory: one call brings and digests what many calls would, whatever the layout."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sync.packed import CHUNK_BYTES, Packed, make_packed
from tests.sync.parts import PROPERTY, bits

from weightcast.sync import limits
from weightcast.sync.chunks import lay_out_chunks
from weightcast.sync.digest import region_digest
from weightcast.sync.host_passes import HostPasses, has_passes, list_strides
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.packer import Packer
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.run_staging import HostStaging
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import Snapshot, allocate_arena
from weightcast.sync.version import Version

pytestmark = pytest.mark.skipif(not has_passes(), reason="the loops in C were not built: no C compiler at install")


@st.composite
def strided(draw: st.DrawFn, region: Region, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the region's shape, rows contiguous, with gaps between slices of the outer dimensions."""
    pitches: list[int] = []
    used = region.shape[-1] if region.shape else 1
    for size in reversed(region.shape[:-1]):
        pitch = used + draw(st.integers(0, 5))
        pitches.insert(0, pitch)
        used = pitch * size
    raw = np.random.default_rng(draw(st.integers(0, 999))).integers(0, 256, used * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).as_strided(region.shape, (*pitches, 1) if region.shape else ())


@settings(PROPERTY, max_examples=150)
@given(st.data())
def test_a_call_for_many_pieces_copies_and_digests_each(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=6))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))
    regions = [Region(str(n), tuple(data.draw(st.integers(0, 99)) for _ in s), s) for n, s in enumerate(shapes)]
    sources = [data.draw(strided(region, dtype)) for region in regions]
    targets = [torch.zeros(region.shape, dtype=dtype) for region in regions]
    left_out = data.draw(st.sets(st.integers(0, len(regions) - 1)))
    passes = HostPasses(regions, [dtype.itemsize] * len(regions))
    for number, source in enumerate(sources):
        passes.place(number, source.stride(), list_strides(tuple(source.shape)))
    first = data.draw(st.integers(0, len(regions) - 1))
    places = [(0 if n in left_out else sources[n].data_ptr(), targets[n].data_ptr()) for n in range(len(regions))]
    of_sources, of_targets = np.array(places[first:], np.int64).T
    digests = passes.run(first, len(regions), of_sources, of_targets, streams=True)
    for number, digest in enumerate(digests.tolist(), first):
        if number in left_out:
            assert digest == 0 and not bits(targets[number]).any()
        else:
            assert digest == region_digest(sources[number].contiguous(), regions[number])
            assert torch.equal(bits(targets[number]), bits(sources[number].contiguous()))


LIVES = {
    "plain": torch.randn(40, 64),
    "transposed": torch.randn(48, 30).T,
    "cast": torch.randn(20, 8, dtype=torch.float64),
    "rows": torch.randn(33, 128)[:, 17:49],
    "norm": torch.randn(70),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


CHUNK = 4096


def make_packer(lives: dict[str, torch.Tensor]) -> Packer:
    """A packer of tensors in whatever layout, published as fp32; it takes those that `lives` has just then."""
    specs = {name: TensorSpec(name, torch.float32, tuple(live.shape)) for name, live in lives.items()}
    regions = [spec.whole() for spec in specs.values()]
    held = {region: HeldRegion(region, partial(lives.__getitem__, region.name)) for region in regions}
    chunks = lay_out_chunks(regions, dict.fromkeys(specs, torch.float32), CHUNK)
    return Packer(held, specs, regions, chunks, allocate_arena(sum(chunk.num_bytes for chunk in chunks)), 4)


def pack(packer: Packer, number: int, *, runs: bool) -> Snapshot:
    """Pack a version in runs, or chunk by chunk."""
    snapshot = packer.begin(Version(1, number), "off", rereads=False)
    while snapshot.num_ready < len(snapshot):
        before = snapshot.num_ready
        (packer.pack_run if runs else packer.pack_next)(snapshot)
        assert runs or snapshot.num_ready == before + 1
    return snapshot


def test_runs_pack_what_chunks_one_by_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_PACKING_RUN_BYTES", 3 * CHUNK)
    lives = {f"{name}{copy}": live for copy in range(4) for name, live in LIVES.items()}
    alone, together = make_packer(lives), make_packer(lives)
    for number in (1, 2):
        one, many = pack(alone, number, runs=False), pack(together, number, runs=True)
        assert together.digests() == alone.digests() and np.array_equal(together.arena, alone.arena)
        assert [list(state.digests) for state in many.states] == [list(state.digests) for state in one.states]
        # Later the weights lie elsewhere, and otherwise.
        lives |= {"plain0": torch.randn(64, 40).T, "transposed1": torch.randn(30, 48)}


@pytest.fixture(scope="module")
def packed() -> Packed:
    """A source of several tensors, many chunks of one or more pieces."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"big": (40, CHUNK_BYTES // 2), "odd": (7, 333), "norm": (5,), "wide": (3, CHUNK_BYTES)}
    return make_packed({n: torch.randint(0, 256, s, generator=generator).to(torch.uint8) for n, s in sizes.items()})


def test_a_host_lands_a_run_at_once(packed: Packed) -> None:
    snapshot = packed.pack(1, "off")
    shadow = Shadow()
    for _ in range(2):  # the tables are those of the first time
        staging = packed.stage(snapshot, shadow)
        assert isinstance(staging, HostStaging)
        num_chunks = len(staging.layouts[0].chunks)
        starts = staging.layouts[0].start_bytes
        for first in range(0, num_chunks, 5):
            count = min(5, num_chunks - first)
            header = ChunkHeader(snapshot.version, first, "dense", None, b"", count)
            run = staging.begin_run(0, header, packed.packer.arena[starts[first] : starts[first + count]])
            assert run is not None and run.running.is_done and len(run) == starts[first + count] - starts[first]
            staging.land(0, header, run, is_hashed=False)
        tensors = staging.finish()
        assert all(torch.equal(tensors[name], values) for name, values in packed.tensors.items())
        assert staging.num_bytes == starts[-1] and shadow.base((0, num_chunks - 1)) == snapshot.version


def test_a_run_of_other_bits_has_another_digest(packed: Packed) -> None:
    snapshot = packed.pack(2, "off")
    staging = packed.stage(snapshot, Shadow())
    assert isinstance(staging, HostStaging)
    num_chunks = len(staging.layouts[0].chunks)
    altered = packed.packer.arena.copy()
    altered[100] ^= 1
    header = ChunkHeader(snapshot.version, 0, "dense", None, b"", num_chunks)
    run = staging.begin_run(0, header, altered)
    assert run is not None
    staging.land(0, header, run, is_hashed=False)
    assert not staging.is_whole and staging.take_wrong() == ["big"]
