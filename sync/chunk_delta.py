"""Deltas of chunks: one for each piece that changed, in the codec of `delta_codec`. Pure.

    delta = encode_chunk(base, new, parts, max_bytes=chunk.num_bytes // 2)      # raw bytes of the chunk, then and now
    for part, change in zip(parts, parse_chunk(delta.forward, parts)):
        ...                                                                    # `delta_codec.apply_parsed`

A payload is, for each piece in order, its delta's length (0: unchanged) and its delta. A packed one holds the entropy-
coded form of each instead. Pieces have elements of their own size, and lie apart in a receiver's memory.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightcast.sync.chunks import Chunk
from weightcast.sync.delta_codec import apply_parsed, as_elements, find_delta, reverse_delta
from weightcast.sync.delta_format import HEADER_BYTES, ByteArray, Delta, ElementArray, parse_delta
from weightcast.sync.delta_wire import pack_delta, unpack_delta
from weightcast.sync.errors import WireError

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Part:
    """Where a piece lies in a chunk's bytes, and what its elements are."""

    start_byte: int
    num_bytes: int
    itemsize: int

    def elements(self, chunk: ByteArray) -> ElementArray:
        """The piece's elements, a view of the chunk's bytes."""
        return as_elements(chunk[self.start_byte : self.start_byte + self.num_bytes], self.itemsize)


@dataclass(frozen=True, slots=True)
class ChunkDelta:
    """From a chunk's old bytes to its new ones and back; `packed` is the entropy-coded way forward, where asked for."""

    forward: bytes
    reverse: bytes
    packed: bytes | None
    num_changes: int

    @property
    def is_same(self) -> bool:
        """Whether nothing changed."""
        return not self.num_changes

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return len(self.forward) + len(self.reverse) + len(self.packed or b"")


SAME = ChunkDelta(b"", b"", None, 0)


def list_parts(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> tuple[Part, ...]:
    """A part for each piece of a chunk."""
    return tuple(Part(piece.start_byte, piece.num_bytes, dtypes[piece.region.name].itemsize) for piece in chunk.pieces)


def encode_chunk(
    base: ByteArray, new: ByteArray, parts: Sequence[Part], max_bytes: int, *, pack: bool = False
) -> ChunkDelta | None:
    """The delta between two states of a chunk, or None when the way forward would take more than `max_bytes`.

    The gaps between pieces are the same in both (zero). `pack` adds the entropy-coded form.
    """

    def find(part: Part, limit_bytes: int) -> tuple[Delta, Delta] | None:
        old, now = part.elements(base), part.elements(new)
        delta = find_delta(old, now, limit_bytes)
        if delta is None or not delta.num_changes:
            return None if delta is None else (delta, delta)
        return delta, reverse_delta(delta, old, now)

    return join_changes(parts, find, max_bytes, [part.elements(base) for part in parts] if pack else None)


def join_changes(
    parts: Sequence[Part],
    find: Callable[[Part, int], tuple[Delta, Delta] | None],
    max_bytes: int,
    old_elements: Sequence[ElementArray] | None,
) -> ChunkDelta | None:
    """`encode_chunk` by whatever finds the changes of a part, forward and back, in at most so many bytes, or None.

    With `old_elements`, those of each part, the entropy-coded form is added.
    """
    forward, reverse, packed = [], [], []
    left_bytes, num_changes = max_bytes, 0
    for number, part in enumerate(parts):
        left_bytes -= _LENGTH.size
        found = find(part, max(HEADER_BYTES, left_bytes))
        if found is None or (found[0].num_changes and found[0].num_bytes > left_bytes):
            return None
        delta, back = found
        num_changes += delta.num_changes
        delta_bytes, back_bytes = (delta.to_bytes(), back.to_bytes()) if delta.num_changes else (b"", b"")
        left_bytes -= len(delta_bytes)
        forward.append(delta_bytes)
        reverse.append(back_bytes)
        if old_elements is not None:
            packed.append(pack_delta(delta_bytes, old_elements[number]) if delta_bytes else b"")
    if not num_changes:
        return SAME
    return ChunkDelta(_join(forward), _join(reverse), None if old_elements is None else _join(packed), num_changes)


def count_changes(base: ByteArray, new: ByteArray, parts: Sequence[Part]) -> int:
    """How many elements differ."""
    return sum(int(np.count_nonzero(part.elements(base) != part.elements(new))) for part in parts)


def _join(payloads: Iterable[bytes]) -> bytes:
    return b"".join(part for payload in payloads for part in (_LENGTH.pack(len(payload)), payload))


def read_changes(
    encoding: str,
    body: ByteArray | None,
    parts: Sequence[Part],
    base: Callable[[int], ElementArray | None],
) -> list[Delta | None]:
    """`parse_chunk` or `unpack_chunk`, by a header's encoding; nothing changed where it says `same`.

    Raises `WireError` when the body does not go with the encoding, and as they do.
    """
    if encoding == "same" and body is None:
        return [None] * len(parts)
    if encoding == "delta" and body is not None:
        return parse_chunk(body, parts)
    if encoding == "zdelta" and body is not None:
        return unpack_chunk(body, parts, base)
    raise WireError(f"is said to be {encoding!r} and has {0 if body is None else len(body)} bytes")


def parse_chunk(payload: bytes | memoryview | ByteArray, parts: Sequence[Part]) -> list[Delta | None]:
    """The delta of each part, None where it is unchanged; every one is checked before the first is returned.

    Raises `WireError` when the payload is malformed or made for another chunk.
    """
    return [
        parse_delta(raw, part.itemsize, part.num_bytes // part.itemsize) if len(raw) else None
        for part, raw in zip(parts, _split(payload, len(parts)), strict=True)
    ]


def unpack_chunk(
    packed: bytes | memoryview | ByteArray, parts: Sequence[Part], base: Callable[[int], ElementArray | None]
) -> list[Delta | None]:
    """`parse_chunk` of a packed payload; `base(n)` gives the elements of part `n`, which must be as in the base.

    A part of which it gives none is of no interest, and has None.
    """
    deltas: list[Delta | None] = []
    for number, (part, raw) in enumerate(zip(parts, _split(packed, len(parts)), strict=True)):
        elements = base(number) if len(raw) else None
        if elements is None:
            deltas.append(None)
            continue
        payload = unpack_delta(raw, elements)
        deltas.append(parse_delta(payload, part.itemsize, part.num_bytes // part.itemsize))
    return deltas


def _split(payload: bytes | memoryview | ByteArray, num_parts: int) -> Iterator[ByteArray]:
    raw = np.frombuffer(payload, np.uint8)
    start = 0
    for number in range(num_parts):
        if start + _LENGTH.size > len(raw):
            raise WireError(f"a chunk's delta of {len(raw)} bytes ends before part {number} of {num_parts}; not used")
        (num_bytes,) = _LENGTH.unpack(raw[start : start + _LENGTH.size].tobytes())
        start += _LENGTH.size
        if start + num_bytes > len(raw):
            raise WireError(
                f"part {number} of a chunk's delta says {num_bytes} bytes where {len(raw) - start} are left; not used"
            )
        yield raw[start : start + num_bytes]
        start += num_bytes
    if start != len(raw):
        raise WireError(f"a chunk's delta of {num_parts} parts has {len(raw) - start} bytes too many; it is not used")


def apply_chunk(payload: bytes, parts: Sequence[Part], chunk: ByteArray) -> None:
    """Bring a chunk's bytes to the state that `payload` was made for; nothing is written unless all of it is sound."""
    for part, delta in zip(parts, parse_chunk(payload, parts), strict=True):
        if delta is not None:
            apply_parsed(delta, part.elements(chunk))
