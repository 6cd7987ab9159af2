"""The delta codec: every bit back, the same bytes on every path, healed when torn, nothing written when malformed."""

import contextlib
import shutil
import struct
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.sync import delta_kernel
from weightcast.sync.compiled import LEVELS
from weightcast.sync.delta_codec import apply_delta, as_elements, encode_delta
from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, Delta, ElementArray, parse_delta
from weightcast.sync.delta_torch import apply_on_device, encode_on_device
from weightcast.sync.delta_wire import pack_delta, unpack_delta
from weightcast.sync.errors import WireError

ITEMSIZES = sorted(ELEMENT_TYPES)
PATHS = [False, True] if delta_kernel.is_available() else [False]


@st.composite
def two_states(draw: st.DrawFn) -> tuple[ElementArray, ElementArray]:
    """An array and what it became: steps of one, of any size, long runs of nothing, and special bit patterns."""
    itemsize = draw(st.sampled_from(ITEMSIZES))
    num_elements = draw(st.sampled_from([0, 1, 31, 32, 33, 254, 255, 256, 700, 1500]))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, num_elements * itemsize, np.uint8)
    base = as_elements(raw, itemsize)
    new = base.copy()
    density = draw(st.sampled_from([0.0, 0.002, 0.01, 0.3, 1.0]))
    changed = np.flatnonzero(generator.random(num_elements) < density)
    if draw(st.booleans()):
        new[changed] += np.asarray(generator.integers(0, 3, len(changed)), new.dtype) - new.dtype.type(1)
    else:
        new[changed] = as_elements(generator.integers(0, 256, len(changed) * itemsize, np.uint8), itemsize)
    return base, new


@pytest.mark.parametrize("use_kernel", PATHS)
@PROPERTY
@given(states=two_states())
def test_a_delta_brings_every_bit(use_kernel: bool, states: tuple[ElementArray, ElementArray]) -> None:
    base, new = states
    payload = encode_delta(base, new, use_kernel=use_kernel)
    assert payload is not None
    current = base.copy()
    apply_delta(payload, current, use_kernel=use_kernel)
    assert current.tobytes() == new.tobytes()


@pytest.mark.parametrize("use_kernel", PATHS)
@PROPERTY
@given(states=two_states(), seed=st.integers(0, 1000))
def test_a_torn_apply_is_healed_by_another(
    use_kernel: bool, states: tuple[ElementArray, ElementArray], seed: int
) -> None:
    base, new = states
    payload = encode_delta(base, new)
    assert payload is not None
    torn = np.where(np.random.default_rng(seed).random(len(base)) < 0.5, base, new)
    apply_delta(payload, torn, use_kernel=use_kernel)
    assert torn.tobytes() == new.tobytes()


@PROPERTY
@given(states=two_states())
def test_the_paths_write_the_same_bytes(states: tuple[ElementArray, ElementArray]) -> None:
    base, new = states
    expected = encode_delta(base, new, use_kernel=False)
    levels = LEVELS[: LEVELS.index(delta_kernel.level()) + 1]
    for level in levels:
        delta = delta_kernel.encode(base, new, 1 << 30, level)
        assert delta is not None and delta.to_bytes() == expected
    limit = len(expected or b"")
    for use_kernel in (False, True):
        assert encode_delta(base, new, limit, use_kernel=use_kernel) == expected
        assert encode_delta(base, new, limit - 1, use_kernel=use_kernel) is None


def test_the_kernel_is_built_where_there_is_a_compiler() -> None:
    assert delta_kernel.is_available() or shutil.which("cc") is None


def payload_of(**parts: Any) -> bytes:
    """A payload made by hand, of two-byte elements; nothing of it is checked."""
    fields: dict[str, Any] = {"num_elements": 300, "values": [], "ordinals": [], "gaps": [3, 255, 1], "low": [7, 9]}
    fields |= parts
    values, ordinals = np.array(fields["values"], np.uint16), np.array(fields["ordinals"], np.uint32)
    gaps, low = np.array(fields["gaps"], np.uint8), np.array(fields["low"], np.uint8)
    return Delta(2, fields["num_elements"], values, ordinals, gaps, low).to_bytes()


def test_a_payload_made_by_hand_is_read() -> None:
    delta = parse_delta(payload_of(ordinals=[1], values=[5000]), 2, 300)
    assert delta.positions().tolist() == [3, 260]
    for use_kernel in PATHS:
        current = np.zeros(300, np.uint16)
        apply_delta(payload_of(ordinals=[1], values=[5000]), current, use_kernel=use_kernel)
        assert {index: int(current[index]) for index in np.flatnonzero(current)} == {3: 7, 260: 5000}


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "at least"),
        (payload_of()[: HEADER_BYTES + 2], "which take"),
        (payload_of() + b"\0", "which take"),
        (payload_of(num_elements=299), "does not fit"),
        (payload_of(gaps=[3, 255, 255, 1]), "reaches to element"),
        (payload_of(gaps=[3, 1, 255]), "past its last change"),
        (payload_of(gaps=[3, 1, 1]), "3 places"),
        (payload_of(ordinals=[1, 1], values=[1, 2]), "must rise"),
        (payload_of(ordinals=[1, 0], values=[1, 2]), "must rise"),
        (payload_of(ordinals=[2], values=[1]), "below its 2 changes"),
        (payload_of(ordinals=[0, 1, 1], values=[1, 2, 3]), "which take"),
    ],
)
def test_a_malformed_delta_is_refused_before_the_first_write(payload: bytes, message: str) -> None:
    current = np.zeros(300, np.uint16)
    with pytest.raises(WireError, match=message):
        apply_delta(payload, current)
    assert not current.any()


@PROPERTY
@given(data=st.data())
def test_noise_is_refused_or_stays_inside(data: st.DataObject) -> None:
    payload = bytearray(payload_of(ordinals=[1], values=[5000]))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    for use_kernel in PATHS:
        guarded = np.full(300 + 2 * 64, 0xABCD, np.uint16)
        try:
            apply_delta(bytes(payload), guarded[64:364], use_kernel=use_kernel)
        except WireError:
            assert (guarded == 0xABCD).all()
        assert (guarded[:64] == 0xABCD).all() and (guarded[364:] == 0xABCD).all()


@PROPERTY
@given(states=two_states())
def test_the_packed_form_gives_the_payload_back(states: tuple[ElementArray, ElementArray]) -> None:
    base, new = states
    payload = encode_delta(base, new)
    assert payload is not None
    assert unpack_delta(pack_delta(payload, base), base) == payload


@PROPERTY
@given(data=st.data())
def test_a_damaged_packed_delta_is_refused_or_stays_inside(data: st.DataObject) -> None:
    base = np.arange(300, dtype=np.uint16)
    packed = bytearray(pack_delta(payload_of(ordinals=[1], values=[5000]), base))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        assert parse_delta(unpack_delta(bytes(packed), base), 2, 300).positions().max(initial=0) < 300


def test_a_packed_delta_that_promises_too_much_is_refused() -> None:
    head, bomb = zstandard.compress(payload_of()), zstandard.compress(bytes(1 << 20))
    packed = struct.pack("<4I", len(head), len(bomb), 0, 0) + head + bomb
    with pytest.raises(WireError, match="says 1048576 bytes"):
        unpack_delta(packed, np.zeros(300, np.uint16))
    with pytest.raises(WireError, match="at least"):
        unpack_delta(b"", np.zeros(300, np.uint16))


@PROPERTY
@given(states=two_states())
def test_torch_writes_the_same_bytes_and_applies_them(states: tuple[ElementArray, ElementArray]) -> None:
    base, new = states
    dtype = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.int64}[base.itemsize]
    before, after = (torch.empty(len(base), dtype=dtype) for _ in states)
    for tensor, state in zip((before, after), states, strict=True):
        tensor.view(torch.uint8).copy_(torch.from_numpy(state.view(np.uint8).copy()))
    delta = encode_on_device(before, after)
    expected = encode_delta(base, new)
    assert delta is not None and delta.to_bytes() == expected
    assert encode_on_device(before, after, len(expected) - 1) is None
    for _ in range(2):  # what is new already stays as it is
        apply_on_device(delta, before)
        assert before.view(torch.uint8).numpy().tobytes() == new.tobytes()
