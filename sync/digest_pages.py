"""Digests of a source's pieces, for receivers that keep parts of a tensor. Pure.

Of a tensor that arrives in part only, a receiver has not seen everything that its digest covers. So a source gives the
digests of all of its pieces, of 8 bytes each, in pages that have indices of chunks: those after its last chunk. A
receiver asks for the pages that name what it leaves out, adds those digests to those of what it got, and the sum must
be the tensor's, as for everybody else. Nobody else asks for them, and they cost the source nothing that it does not
compute anyway.

    pages = write_pages(digests)                    # the source: of all pieces, in the order of its chunks
    find_page(piece_number)                         # (page, place in it)
    read_page(body)                                 # the receiver
"""

from collections.abc import Iterable, Sequence

import numpy as np

from weightcast.sync.chunks import MIN_CHUNK_BYTES
from weightcast.sync.delta_format import ByteArray

DIGEST_BYTES = 8
# A page fits into the smallest chunk that there may be, so that it passes wherever chunks do.
PAGE_DIGESTS = MIN_CHUNK_BYTES // DIGEST_BYTES


def write_pages(digests: Iterable[int]) -> list[bytes]:
    """Pages of little-endian digests; the last may be shorter."""
    raw = np.fromiter(digests, "<u8").tobytes()
    size = PAGE_DIGESTS * DIGEST_BYTES
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def find_page(piece_number: int) -> tuple[int, int]:
    """(page, place in it) of the digest of a source's piece, counted over all of its chunks."""
    return divmod(piece_number, PAGE_DIGESTS)


def size_page(page: int, num_pieces: int) -> int:
    """Bytes of a page of a source that has so many pieces."""
    return DIGEST_BYTES * min(PAGE_DIGESTS, num_pieces - page * PAGE_DIGESTS)


def read_page(body: ByteArray) -> Sequence[int]:
    """The digests of a page."""
    return [int(digest) for digest in np.frombuffer(body, "<u8")]
