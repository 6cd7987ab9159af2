"""Deltas for slow links: entropy-coded with zstandard, about half the bytes, at a quarter of the speed.

The low bytes of new weights look random; the steps to them do not (nine in ten are one unit up or down). So the steps
travel, two to a byte, since no byte-wise code spends less than a bit on one; the few large ones follow. The receiver
turns them back into low bytes *before* it writes anything, from the base that it holds. What it then applies is the
plain form again, safe to apply twice.

    packed = pack_delta(payload, base)                  # on the source
    payload = unpack_delta(packed, staged)              # on the receiver; staged == base
    apply_delta(payload, staged)
"""

import struct
from itertools import accumulate, pairwise

import numpy as np
import zstandard

from weightcast.sync.delta_format import (
    HEADER_BYTES,
    MAX_ELEMENTS,
    SKIP,
    ByteArray,
    Delta,
    ElementArray,
    parse_delta,
)
from weightcast.sync.errors import WireError

# Higher levels gain 1 to 2 % on real deltas and take several times as long.
LEVEL = 1
_LENGTHS = struct.Struct("<4I")
# A step from -7 to 7 is the code 0 to 14; this one stands for a larger step, which is among the large ones.
_LARGE, _ZERO = 15, 7


def pack_delta(payload: bytes, base: ElementArray) -> bytes:
    """`payload`, made by `encode_delta` with this `base`, in its entropy-coded form."""
    delta = parse_delta(payload, base.itemsize, len(base))
    pairs, large = _pair_steps(delta.low - base[delta.positions()].astype(np.uint8))
    head = payload[: len(payload) - len(delta.gaps) - len(delta.low)]
    parts = [zstandard.compress(bytes(part), LEVEL) for part in (head, delta.gaps.data, pairs.data, large.data)]
    return _LENGTHS.pack(*map(len, parts)) + b"".join(parts)


def unpack_delta(packed: bytes | memoryview | ByteArray, base: ElementArray) -> bytes:
    """The payload in `packed`, for an array that still holds the delta's `base`.

    Raises `WireError` when it is malformed or made for another array. Nothing larger than such an array's delta can
    be is ever decompressed.
    """
    raw = np.frombuffer(packed, np.uint8).data
    if len(raw) < _LENGTHS.size:
        raise WireError(f"a packed delta has at least {_LENGTHS.size} bytes, got {len(raw)}; it is not used")
    lengths = _LENGTHS.unpack(raw[: _LENGTHS.size])
    if _LENGTHS.size + sum(lengths) != len(raw):
        raise WireError(f"a packed delta of {len(raw)} bytes has parts of {lengths} bytes; it is not used")
    ends = list(accumulate((_LENGTHS.size, *lengths)))
    head, gaps, pairs, large = (
        _decompress(raw[start:end], max_bytes)
        for (start, end), max_bytes in zip(pairwise(ends), _largest_parts(base), strict=True)
    )
    steps = _read_steps(np.frombuffer(pairs, np.uint8), np.frombuffer(large, np.uint8), len(gaps) - gaps.count(SKIP))
    # The steps stand in for the low bytes while everything else is checked.
    delta = parse_delta(b"".join((head, gaps, steps.tobytes())), base.itemsize, len(base))
    low = steps + base[delta.positions()].astype(np.uint8)
    return Delta(delta.itemsize, delta.num_elements, delta.values, delta.ordinals, delta.gaps, low).to_bytes()


def _largest_parts(base: ElementArray) -> tuple[int, int, int, int]:
    """The most bytes that each part of a delta for an array like `base` can have."""
    num_elements = len(base)
    gaps = num_elements + num_elements // SKIP + 1
    return HEADER_BYTES + num_elements * (base.itemsize + 4), gaps, (num_elements + 1) // 2, num_elements


def _pair_steps(steps: ByteArray) -> tuple[ByteArray, ByteArray]:
    """Codes of steps, two to a byte, and the steps too large for a code."""
    codes = steps + np.uint8(_ZERO)
    is_large = codes >= _LARGE
    codes[is_large] = _LARGE
    codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    pairs: ByteArray = codes[0::2] | codes[1::2] << np.uint8(4)
    return pairs, steps[is_large]


def _read_steps(pairs: ByteArray, large: ByteArray, num_steps: int) -> ByteArray:
    codes = np.stack((pairs & 15, pairs >> 4), axis=1).reshape(-1)
    is_large = codes == _LARGE
    if len(pairs) != (num_steps + 1) // 2 or np.count_nonzero(is_large) != len(large) or codes[num_steps:].any():
        raise WireError(
            f"a packed delta of {num_steps} changes has {len(codes)} codes of steps and {len(large)} large steps; "
            "it is not used"
        )
    steps = codes - np.uint8(_ZERO)
    steps[is_large] = large
    return steps[:num_steps]


def _decompress(part: memoryview, max_bytes: int) -> bytes:
    assert max_bytes <= 16 * MAX_ELEMENTS
    try:
        num_bytes = zstandard.frame_content_size(part)
        if not 0 <= num_bytes <= max_bytes:
            raise WireError(f"a part of a packed delta says {num_bytes} bytes, at most {max_bytes} can be; not used")
        data: bytes = zstandard.ZstdDecompressor().decompress(part, max_output_size=num_bytes)
    except zstandard.ZstdError as error:
        raise WireError(f"a packed delta cannot be decompressed ({error}); it is not used") from None
    return data
