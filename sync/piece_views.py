"""Where a piece lies: in the view of the region around it, and in the bytes of its chunk. Pure.

live[slices_within(piece.region, region)]
view_piece(piece, dtype, buffer)
"""

import torch

from weightcast.sync.chunks import Piece
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.regions import Region


def slices_within(piece: Region, region: Region) -> tuple[slice, ...]:
    """Where a piece lies in the view of the region around it."""
    return tuple(
        slice(start - base, start - base + size)
        for start, base, size in zip(piece.offset, region.offset, piece.shape, strict=True)
    )


def view_piece(piece: Piece, dtype: torch.dtype, buffer: ByteArray) -> torch.Tensor:
    """The piece's place in a chunk's bytes, as a tensor of the piece's shape."""
    raw = torch.from_numpy(buffer[piece.start_byte : piece.start_byte + piece.num_bytes])
    return raw.view(dtype).view(piece.region.shape)
