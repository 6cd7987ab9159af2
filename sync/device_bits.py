"""Bytes of chunks on a device: seen as pieces, and compared with what was published before. Waits for the device.

delta = encode_chunk_on_device(base, new, parts, max_bytes)      # the same bytes as `chunk_delta.encode_chunk`
"""

from collections.abc import Sequence

import torch

from weightcast.sync.chunk_delta import ChunkDelta, Part, join_changes
from weightcast.sync.chunks import ALIGNMENT_BYTES, Piece
from weightcast.sync.delta_format import HEADER_BYTES, Delta, ElementArray
from weightcast.sync.delta_torch import SIGNED, encode_many_on_device


def aligned(raw: torch.Tensor) -> torch.Tensor:
    """The same bytes where pieces of every dtype may be viewed: a chunk may begin anywhere in a source's memory."""
    return raw.clone() if raw.storage_offset() % ALIGNMENT_BYTES else raw


def view_on_device(piece: Piece, dtype: torch.dtype, chunk: torch.Tensor) -> torch.Tensor:
    """The piece's place in an aligned chunk's bytes, as a tensor of the piece's shape."""
    return chunk[piece.start_byte : piece.start_byte + piece.num_bytes].view(dtype).view(piece.region.shape)


def encode_chunk_on_device(
    base: torch.Tensor,
    new: torch.Tensor,
    parts: Sequence[Part],
    max_bytes: int,
    old_elements: "Sequence[ElementArray] | None" = None,
) -> ChunkDelta | None:
    """`chunk_delta.encode_chunk` of two states of a chunk that lie, aligned, on one device.

    `old_elements` are those of each part on the host, for the entropy-coded form; without them there is none.
    """

    pairs = [(_elements(part, base), _elements(part, new)) for part in parts]
    found = dict(zip(parts, encode_many_on_device(pairs, max(max_bytes, HEADER_BYTES), both=True), strict=True))

    def find(part: Part, limit_bytes: int) -> tuple[Delta, Delta] | None:
        there, back = found[part] or (None, None)
        return (there, back) if there is not None and back is not None and there.num_bytes <= limit_bytes else None

    return join_changes(parts, find, max_bytes, old_elements)


def count_changes_on_device(base: torch.Tensor, new: torch.Tensor, parts: Sequence[Part]) -> int:
    """How many elements differ."""
    counts = [(_elements(part, base) != _elements(part, new)).sum() for part in parts]
    return int(torch.stack(counts).sum()) if counts else 0


def _elements(part: Part, chunk: torch.Tensor) -> torch.Tensor:
    return chunk[part.start_byte : part.start_byte + part.num_bytes].view(SIGNED[part.itemsize])
