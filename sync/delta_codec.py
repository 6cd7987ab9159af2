"""Makes and applies deltas on a CPU: with the compiled kernel where it was built, otherwise with numpy; the same bytes.

    payload = encode_delta(last_published, now)         # two arrays of one shape and dtype, as raw elements
    apply_delta(payload, staged)                        # staged == last_published becomes now, bit for bit

Elements are compared as bits, so NaNs, signed zeros and every dtype of 1, 2, 4 or 8 bytes are nothing special.
"""

import numpy as np

from weightcast.sync import delta_kernel
from weightcast.sync.delta_format import (
    ELEMENT_TYPES,
    HEADER_BYTES,
    SKIP,
    ByteArray,
    Delta,
    ElementArray,
    parse_delta,
)

_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def as_elements(raw: ByteArray, itemsize: int) -> ElementArray:
    """Contiguous bytes as elements of `itemsize` bytes (1, 2, 4 or 8)."""
    elements: ElementArray = raw.view(ELEMENT_TYPES[itemsize])
    return elements


def encode_delta(
    base: ElementArray, new: ElementArray, max_bytes: int | None = None, *, use_kernel: bool | None = None
) -> bytes | None:
    """The payload that turns `base` into `new`, or None when it would take more than `max_bytes` (default: no limit).

    Both are contiguous one-dimensional arrays of unsigned elements, of one length. `use_kernel` forces the compiled
    kernel or numpy; by default the kernel is used where it was built.
    """
    delta = find_delta(base, new, max_bytes, use_kernel=use_kernel)
    return None if delta is None else delta.to_bytes()


def find_delta(
    base: ElementArray, new: ElementArray, max_bytes: int | None = None, *, use_kernel: bool | None = None
) -> Delta | None:
    """What `encode_delta` puts into a payload."""
    assert base.dtype == new.dtype and base.shape == new.shape and base.ndim == 1, (base.shape, new.shape)
    # Every element takes at most a gap byte and a low byte, or also itself and its ordinal.
    limit = max_bytes if max_bytes is not None else HEADER_BYTES + len(new) * (new.itemsize + 6) + len(new) // SKIP
    with_kernel = use_kernel if use_kernel is not None else delta_kernel.is_available()
    return delta_kernel.encode(base, new, limit) if with_kernel else _encode_numpy(base, new, limit)


def reverse_delta(delta: Delta, base: ElementArray, new: ElementArray) -> Delta:
    """The delta from `new` back to `base`, given the one from `base` to `new`. Pure."""
    positions = delta.positions()
    return _make(delta.gaps, new[positions], base[positions], delta.num_elements)


def apply_delta(
    payload: bytes | memoryview | ByteArray, current: ElementArray, *, use_kernel: bool | None = None
) -> None:
    """Bring `current`, a writable contiguous array, to the state that `payload` was made for.

    Each element may be in its old or its new state. Raises `WireError` before the first write when the payload is
    malformed or made for an array of another size.
    """
    apply_parsed(parse_delta(payload, current.itemsize, len(current)), current, use_kernel=use_kernel)


def apply_parsed(delta: Delta, current: ElementArray, *, use_kernel: bool | None = None) -> None:
    """`apply_delta` with what `parse_delta` made of a payload for this array."""
    if use_kernel if use_kernel is not None else delta_kernel.is_available():
        delta_kernel.apply(delta, current)
        return
    positions = delta.positions()
    current[positions] = resolve(delta, current[positions])


def resolve(delta: Delta, current: ElementArray) -> ElementArray:
    """The new state of the changed elements, given their present one. Pure."""
    low = delta.low.astype(current.dtype)
    step = (low - current).astype(np.int8)  # the low byte of the difference, with its sign
    new: ElementArray = current + step.astype(_SIGNED[delta.itemsize]).view(current.dtype)
    new[delta.ordinals] = delta.values
    return new


def _encode_numpy(base: ElementArray, new: ElementArray, max_bytes: int) -> Delta | None:
    positions = np.flatnonzero(base != new)
    if HEADER_BYTES + 2 * len(positions) > max_bytes:
        return None
    changed = new[positions]
    skipped = np.diff(positions, prepend=-1) - 1
    num_skips = skipped // SKIP
    gaps = np.full(len(positions) + int(num_skips.sum()), SKIP, np.uint8)
    gaps[np.cumsum(num_skips + 1) - 1] = skipped % SKIP
    delta = _make(gaps, base[positions], changed, len(new))
    return delta if delta.num_bytes <= max_bytes else None


def _make(gaps: ByteArray, old: ElementArray, changed: ElementArray, num_elements: int) -> Delta:
    """The delta that turns the elements `old`, at the places of `gaps`, into `changed`."""
    step = (changed - old).view(_SIGNED[changed.itemsize])
    ordinals = np.flatnonzero((step < -128) | (step > 127)).astype(np.uint32)
    return Delta(changed.itemsize, num_elements, changed[ordinals], ordinals, gaps, changed.astype(np.uint8))
