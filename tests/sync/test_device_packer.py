"""A source and an engine that work on a device do what those on the host do, byte by byte. The device is a CPU here."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.packed import CHUNK_BYTES, answer, make_packed
from tests.sync.parts import PROPERTY, WAIT_S, TensorSource, assert_same_bits, bits, make_model, make_specs, random_bits
from tests.sync.table_runner import run_by_numpy

from weightcast.sync import HeldRegion, WeightPublisher, device_passes
from weightcast.sync.delta_codec import as_elements, find_delta, reverse_delta
from weightcast.sync.delta_torch import encode_many_on_device
from weightcast.sync.device_packer import DevicePacker
from weightcast.sync.device_pool import DevicePool
from weightcast.sync.device_room import find_room, has_room
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.packer import Packer, PackMode
from weightcast.sync.shadow import Shadow
from weightcast.sync.share import Share

CPU = torch.device("cpu")
MODES: tuple[PackMode, ...] = ("off", "on", "zstd")


@pytest.fixture(scope="module", autouse=True, params=[None, run_by_numpy], ids=["by-torch", "by-tables"])
def runner(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything is done by torch, and as a kernel does what it can of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_passes, "find_runner", lambda device: request.param)
        yield


@PROPERTY
@given(
    st.sampled_from([torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64]),
    st.integers(0, 2000),
    st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    st.integers(0, 5000),
    st.integers(0, 100),
)
def test_changes_are_found_forward_and_back_as_on_the_host(
    dtype: torch.dtype, size: int, density: float, max_bytes: int, seed: int
) -> None:
    old, other = random_bits(dtype, (size,), seed), random_bits(dtype, (size,), seed + 1)
    is_changed = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density
    new = torch.where(is_changed, other.view(_signed(dtype)), old.view(_signed(dtype))).view(dtype)
    before, after = (as_elements(bits(tensor).numpy(), dtype.itemsize) for tensor in (old, new))
    wanted = find_delta(before, after, max_bytes)
    (found,) = encode_many_on_device([(old, new)], max_bytes, both=True)
    assert (wanted is None) == (found is None)
    if wanted is not None and found is not None:
        assert found[0].to_bytes() == wanted.to_bytes() and found[1] is not None
        assert found[1].to_bytes() == reverse_delta(wanted, before, after).to_bytes()


def _signed(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from(MODES), st.sampled_from([0, 1, 40, 3000])), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([4096, 4112, 16384]),
)
def test_every_answer_is_that_of_the_host(
    steps: list[tuple[PackMode, int]], host_is_read: bool, chunk_bytes: int
) -> None:
    tensors = make_model(3, rows=60)
    host = make_packed(tensors, chunk_bytes=chunk_bytes, history=2)
    there = make_packed(tensors, chunk_bytes=chunk_bytes, history=2, device="cpu", host_is_read=host_is_read)
    for number, (mode, num_changed) in enumerate(steps, 1):
        _change(tensors, num_changed, number)
        snapshots = host.pack(number, mode), there.pack(number, mode)
        assert host.digests() == there.digests()
        assert host.packer.delta_bytes == there.packer.delta_bytes
        assert host.packer.changed_elements == there.packer.changed_elements
        if host_is_read:
            assert np.array_equal(host.packer.arena, there.packer.arena)
        for index in range(0, len(snapshots[0]), 1 + number % 3):
            for base in (None, *(snapshots[0].version.__class__(1, back) for back in range(1, number + 1))):
                mine, theirs = (answer(snapshot, index, base) for snapshot in snapshots)
                assert mine[0] == theirs[0]
                assert (mine[1] is None) == (theirs[1] is None)
                assert mine[1] is None or theirs[1] is None or np.array_equal(mine[1], theirs[1])


def _change(tensors: dict[str, torch.Tensor], num_changed: int, seed: int) -> None:
    """Random bits in so many bytes of each tensor, fewer where it has fewer."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        raw = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
        if len(raw) and tensor.dtype is not torch.bool:
            places = torch.randint(0, len(raw), (num_changed,), generator=generator)
            raw[places] = torch.randint(0, 256, (num_changed,), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("staged_on", [None, CPU], ids=["to-host", "to-device"])
@pytest.mark.parametrize("packed_on", [None, "cpu"], ids=["from-host", "from-device"])
def test_versions_come_out_bit_equal_from_either_to_either(
    packed_on: str | None, staged_on: torch.device | None
) -> None:
    tensors, shadow = make_model(5, rows=200), Shadow(device=staged_on)
    packed = make_packed(tensors, device=packed_on)
    seen = set()
    for number, (mode, num_changed) in enumerate([("on", 0), ("on", 9), ("zstd", 9), ("on", 0), ("on", 99_999)], 1):
        _change(tensors, num_changed, number)
        found, encodings = packed.send(packed.pack(number, mode), shadow)  # type: ignore[arg-type]
        assert_same_bits(found, tensors)
        seen.update(encodings)
        del found
    assert seen == {"dense", "delta", "zdelta", "same"}


def test_what_lay_on_the_device_is_landed_there_from_any_byte_on() -> None:
    tensors = make_model(6, rows=200)
    packed = make_packed(tensors, device="cpu")
    snapshot = packed.pack(1, "off")
    staging = packed.stage(snapshot, Shadow(device=CPU))
    layout = packed.layouts[0]
    memory = torch.cat([torch.zeros(3, dtype=torch.uint8), *(state.there for state in snapshot.states)])  # type: ignore[attr-defined]
    for index, (start, chunk) in enumerate(zip(layout.start_bytes, layout.chunks, strict=False)):
        header, _ = answer(snapshot, index)
        with pytest.raises(WireError, match=f"has 5 bytes, {chunk.num_bytes} were announced"):
            staging.land(0, header, memory[:5], is_hashed=False)
        staging.land(0, header, memory[3 + start : 3 + start + chunk.num_bytes], is_hashed=False)
    assert staging.open_landing(0, header, layout.chunks[-1].num_bytes, np.zeros(CHUNK_BYTES, np.uint8)) is None
    assert_same_bits(staging.finish(), tensors)


def test_a_version_that_broke_off_leaves_the_next_one_whole() -> None:
    tensors = make_model(7, rows=100)
    packed = make_packed(tensors, device="cpu")
    packed.pack(1)
    held, region = packed.packer._held, packed.specs[3].whole()
    for mode in ("off", "on"):
        _change(tensors, 50, 1)
        packed.packer._held = {**held, region: HeldRegion(region, lambda: torch.zeros(2))}
        with pytest.raises(SourceError, match="live view of layer"):
            packed.pack(2, mode)
        packed.packer._held = held
        assert_same_bits(packed.send(packed.pack(3), Shadow())[0], tensors)


def test_memory_of_a_pool_is_reused_when_nobody_holds_it() -> None:
    pool, (spec,) = DevicePool(CPU), make_specs({"w": torch.zeros(4, 3, dtype=torch.bfloat16)})
    first = pool.take(spec)
    first.fill_(1)
    view = first[1:]
    kept = pool.take(spec, keep_bits=True)
    assert kept.data_ptr() != first.data_ptr() and torch.equal(kept, first)
    del first, kept
    other = pool.take(spec)
    address = other.data_ptr()
    assert other.shape == (4, 3) and bool((view == 1).all())
    del other
    assert pool.take(spec).data_ptr() == address


def test_room_leaves_the_trainer_its_reserve() -> None:
    assert has_room(free_bytes=30, total_bytes=100, num_bytes=20)
    assert not has_room(free_bytes=29, total_bytes=100, num_bytes=20)


def test_weights_on_a_cpu_are_packed_on_it(tmp_path: Path) -> None:
    tensors = make_model(8)
    held = {item.region: item for item in TensorSource(tensors).held()}
    assert find_room(tuple(held), held, 10) is None
    share = Share(TensorSource(tensors), 4, (), keeps_bits_on_device=True)
    packer = share.prepare(tuple(held), 4096, is_read=False)
    assert type(packer) is Packer and not isinstance(packer, DevicePacker)
    with WeightPublisher(TensorSource(tensors), f"ipc://{tmp_path}/p", delta="on", timeout_s=WAIT_S) as publisher:
        assert publisher.publish(1).dense_bytes == publisher.num_bytes


@pytest.mark.parametrize("reads_all", [False, True])
def test_bits_that_an_engine_holds_are_copied_or_read_anew(reads_all: bool) -> None:
    tensors, shadow = make_model(9, rows=100), Shadow(device=CPU)
    shadow.reads_all = reads_all
    packed = make_packed(tensors, device="cpu")
    held, _ = packed.send(packed.pack(1), shadow)
    _change(tensors, 3, 1)
    second, encodings = packed.send(packed.pack(2), shadow)
    assert_same_bits(second, tensors)
    assert set(encodings) == ({"dense"} if reads_all else {"delta", "same"})
    assert held["embed.weight"].data_ptr() != second["embed.weight"].data_ptr()
    del held, second
    # Nobody holds what was staged last: it is written over, and its bits are what a delta begins from.
    _, encodings = packed.send(packed.pack(3), shadow)
    assert set(encodings) == {"same"}
