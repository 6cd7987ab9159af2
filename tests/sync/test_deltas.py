"""Deltas between versions: whatever a receiver has, it comes to the same bits, by the least that has to be sent."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.packed import CHUNK_BYTES, Packed, answer, make_packed
from tests.sync.parts import PROPERTY, assert_same_bits, bits, make_model, make_specs, random_bits, split_rows

from weightcast.sync import Region, Version
from weightcast.sync.chunk_delta import Part, apply_chunk, encode_chunk, parse_chunk, unpack_chunk
from weightcast.sync.errors import WireError
from weightcast.sync.packer import PackMode
from weightcast.sync.shadow import Shadow


def change(tensors: dict[str, torch.Tensor], seed: int, share: float = 0.01) -> None:
    """Flip low bits of some elements, and all bits of a few."""
    generator = np.random.default_rng(seed)
    for tensor in tensors.values():
        if tensor.numel():
            raw = bits(tensor).clone().numpy()
            places = generator.random(len(raw)) < share
            raw[places] ^= generator.integers(0, 256, int(places.sum()), dtype=np.uint8)
            tensor.copy_(torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape))


def plain_model(rows: int = 200) -> dict[str, torch.Tensor]:
    """`make_model` without the tensor of booleans, of which not every byte is one."""
    return {name: tensor for name, tensor in make_model(1, rows).items() if tensor.dtype is not torch.bool}


@pytest.mark.parametrize("mode", ["on", "zstd"])
def test_what_changed_is_all_that_is_sent(mode: PackMode) -> None:
    packed, shadow = make_packed(plain_model()), Shadow()
    tensors, encodings = packed.send(packed.pack(1, mode), shadow)
    assert set(encodings) == {"dense"}
    assert_same_bits(tensors, packed.tensors)
    del tensors
    packed.tensors["embed.weight"].view(torch.int16)[3, 5] += 1
    snapshot = packed.pack(2, mode)
    tensors, encodings = packed.send(snapshot, shadow)
    assert encodings.count("delta" if mode == "on" else "zdelta") == 1 and set(encodings[1:]) == {"same"}
    assert packed.packer.changed_elements == 1 and packed.packer.delta_bytes < 150
    assert_same_bits(tensors, packed.tensors)


def test_what_changed_too_much_is_sent_whole() -> None:
    packed, shadow = make_packed(plain_model()), Shadow()
    packed.send(packed.pack(1), shadow)
    for name, tensor in packed.tensors.items():
        tensor.copy_(random_bits(tensor.dtype, tuple(tensor.shape), len(name)))
    tensors, encodings = packed.send(packed.pack(2), shadow)
    assert set(encodings) == {"dense"}
    assert_same_bits(tensors, packed.tensors)


@PROPERTY
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["on", "zstd", "off"]),
            st.sampled_from([0.0, 0.002, 0.05, 0.9]),
            st.sets(st.sampled_from("abc")),
            st.booleans(),
        ),
        min_size=1,
        max_size=7,
    ),
    history=st.integers(0, 3),
    is_cut=st.booleans(),
)
def test_receivers_that_miss_versions_catch_up(
    steps: Sequence[tuple[PackMode, float, set[str], bool]], history: int, is_cut: bool
) -> None:
    model = plain_model(rows=150)
    regions = [region for spec in make_specs(model) for region in dict.fromkeys(split_columns(spec.whole(), is_cut))]
    packed = make_packed(model, regions=regions, history=history)
    shadows = {name: Shadow() for name in "abc"}
    held: list[dict[str, torch.Tensor]] = []
    for number, (mode, share, receivers, is_held) in enumerate(steps):
        change(packed.tensors, number, share)
        snapshot = packed.pack(number, mode)
        for name in sorted(receivers):
            tensors, _ = packed.send(snapshot, shadows[name])
            assert_same_bits(tensors, packed.tensors)
            if is_held:
                held.append(tensors)
                held.append({name: tensor.clone() for name, tensor in tensors.items()})
            del tensors
    for kept, copy in zip(held[::2], held[1::2], strict=True):
        assert_same_bits(kept, copy)


def split_columns(region: Region, is_cut: bool) -> list[Region]:
    """Two boxes along the last dimension, whose rows lie apart in the tensor."""
    if not is_cut or len(region.shape) < 2 or region.shape[-1] < 2 or not region.numel:
        return [region]
    left = region.shape[-1] // 2
    return [
        replace(region, shape=(*region.shape[:-1], left)),
        replace(region, offset=(*region.offset[:-1], left), shape=(*region.shape[:-1], region.shape[-1] - left)),
    ]


def test_a_merged_delta_is_smaller_than_its_steps() -> None:
    tensors = {"w": random_bits(torch.bfloat16, (400, 500), 3)}
    packed, shadow = make_packed(tensors, chunk_bytes=1 << 20), Shadow()
    packed.send(packed.pack(0), shadow)
    single = 0
    for number in (1, 2, 3):
        tensors["w"].view(torch.int16)[::20] += 1
        snapshot = packed.pack(number)
        single += packed.packer.delta_bytes
    header, body = answer(snapshot, 0, Version(1, 0))
    assert header.encoding == "delta" and header.base == Version(1, 0) and body is not None
    assert len(body) < 0.4 * single
    tensors_got, encodings = packed.send(snapshot, shadow)
    assert encodings == ["delta"]
    assert_same_bits(tensors_got, tensors)
    assert answer(snapshot, 0, Version(1, 7))[0].encoding == "dense"
    assert answer(snapshot, 0, Version(0, 2))[0].encoding == "dense"


def test_history_is_bounded_in_versions_and_bytes() -> None:
    tensors = {"w": random_bits(torch.bfloat16, (400, 500), 4)}
    packed = make_packed(tensors, history=2, chunk_bytes=1 << 20)
    packed.pack(0)
    for number in (1, 2, 3):
        tensors["w"].view(torch.int16)[::100] += 1
        snapshot = packed.pack(number)
    assert [answer(snapshot, 0, Version(1, base))[0].encoding for base in (0, 1, 2)] == ["dense", "delta", "delta"]
    for number in (4, 5):
        tensors["w"].view(torch.int16)[::3] += 1
        snapshot = packed.pack(number)
    assert [answer(snapshot, 0, Version(1, base))[0].encoding for base in (3, 4)] == ["dense", "delta"]


def torn(packed: Packed) -> tuple[Shadow, int]:
    """A receiver with version 1 of which one element is not as it should be, in the chunk that is named."""
    shadow = Shadow()
    tensors, _ = packed.send(packed.pack(1), shadow)
    tensors["embed.weight"].view(torch.int16)[100, 7] ^= 3
    return shadow, 100 * 96 // CHUNK_BYTES


@pytest.mark.parametrize("mode", ["on", "zstd"])
def test_a_base_that_is_not_what_it_should_be_is_noticed_and_sent_whole(mode: PackMode) -> None:
    packed = make_packed(plain_model())
    shadow, index = torn(packed)
    packed.tensors["embed.weight"].view(torch.int16)[100, 9] += 1
    snapshot = packed.pack(2, mode)
    staging = packed.stage(snapshot, shadow)
    for number in range(len(snapshot)):
        staging.land(0, *answer(snapshot, number, staging.base(0, number)))
    assert staging.take_wrong() == ["embed.weight"]
    assert (0, index) in staging.reopen(["embed.weight"])
    for number in range(len(snapshot)):
        staging.land(0, *answer(snapshot, number, staging.base(0, number)))
    assert staging.take_wrong() == []
    assert_same_bits(staging.finish(), packed.tensors)


def test_a_delta_of_another_base_is_not_applied() -> None:
    packed, shadow = make_packed(plain_model()), Shadow()
    packed.send(packed.pack(1), shadow)
    packed.tensors["embed.weight"].view(torch.int16)[:, ::9] += 1
    packed.pack(2)
    packed.tensors["embed.weight"].view(torch.int16)[:, ::9] += 1
    snapshot = packed.pack(3)
    staging = packed.stage(snapshot, shadow)
    header, body = answer(snapshot, 0, Version(1, 2))
    assert header.encoding == "delta"
    with pytest.raises(WireError, match=r"changes version 2 .* this engine has 1"):
        staging.land(0, header, body)
    staging.land(0, *answer(snapshot, 0, staging.base(0, 0)))
    assert not staging.is_missing(0, 0)


PARTS = (Part(0, 400, 2), Part(400, 96, 4), Part(496, 16, 1))


def make_change() -> tuple[np.ndarray, np.ndarray]:
    old = np.random.default_rng(0).integers(0, 256, 512, dtype=np.uint8)
    new = old.copy()
    new[[0, 100, 101, 403, 500]] ^= 0x55
    return old, new


@PROPERTY
@given(st.data())
def test_a_damaged_delta_is_refused_before_anything_is_written_or_fits(data: st.DataObject) -> None:
    old, new = make_change()
    delta = encode_chunk(old, new, PARTS, 10_000, pack=True)
    assert delta is not None and delta.packed is not None
    raw = bytearray(data.draw(st.sampled_from([delta.forward, delta.packed])))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] + data.draw(st.binary(max_size=3))
    current = old.copy()
    try:
        apply_chunk(bytes(raw), PARTS, current)
    except WireError:
        assert np.array_equal(current, old)
    try:
        unpack_chunk(bytes(raw), PARTS, lambda number: PARTS[number].elements(old))
    except WireError:
        assert np.array_equal(current[:0], old[:0])


def test_forward_and_back_and_packed_agree() -> None:
    old, new = make_change()
    delta = encode_chunk(old, new, PARTS, 10_000, pack=True)
    assert delta is not None and delta.packed is not None and delta.num_changes == 4
    current = old.copy()
    apply_chunk(delta.forward, PARTS, current)
    assert np.array_equal(current, new)
    apply_chunk(delta.forward, PARTS, current)
    assert np.array_equal(current, new)
    apply_chunk(delta.reverse, PARTS, current)
    assert np.array_equal(current, old)
    plain = parse_chunk(delta.forward, PARTS)
    unpacked = unpack_chunk(delta.packed, PARTS, lambda number: PARTS[number].elements(old))
    assert [None if part is None else part.to_bytes() for part in unpacked] == [
        None if part is None else part.to_bytes() for part in plain
    ]
    assert encode_chunk(old, new, PARTS, len(delta.forward) - 1) is None
    assert encode_chunk(old, old, PARTS, 0) is not None


def test_rows_of_sources_change_apart() -> None:
    model = {"w": random_bits(torch.bfloat16, (40, 64), 9)}
    (spec,) = make_specs(model)
    top, bottom = split_rows(spec, 2)
    packed, shadow = make_packed(model, regions=[top, bottom]), Shadow()
    packed.send(packed.pack(1), shadow)
    model["w"].view(torch.int16)[30, 3] += 1
    tensors, _ = packed.send(packed.pack(2), shadow)
    assert_same_bits(tensors, model)
