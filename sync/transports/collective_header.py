"""Headers of broadcasts: what a receiver knows of a bucket before it believes a byte of it. Pure.

Every broadcast of ours is a header of `HEADER_BYTES` bytes, or the payload that the header before it described. A
header says which source sends which bucket of which version in which generation of the group, gives the hash of
every chunk in it, and carries a hash of itself. It is a fixed binary form, little-endian; nothing is unpickled.

    offset  bytes  field
    0       8      magic, b"wcbucket"
    8       2 2 4  form (1), kind, source rank
    16      8 8 8  generation of the group, epoch and number of the version
    40      8      fingerprint of the plan
    48      8      index of the bucket
    56      8      bytes of the payload that follows
    64      4 4    number of hashes, zero
    72      16 n   xxh3-128 of each chunk of the bucket, or of the seal
    -8      8      xxh3-64 of all bytes before it
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from weightcast.sync.errors import WireError
from weightcast.sync.transports.collective_buckets import MAX_CHUNKS_A_BUCKET
from weightcast.sync.version import Version

HEADER_BYTES = 4096
HASH_BYTES = 16
_MAGIC = b"wcbucket"
_FORM = 1
_FIXED = struct.Struct("<8sHHIQQQQQQII")
_CHECK = struct.Struct("<Q")
assert _FIXED.size + HASH_BYTES * MAX_CHUNKS_A_BUCKET + _CHECK.size <= HEADER_BYTES


class Kind(IntEnum):
    """What a header announces."""

    OPEN = 1
    """A version begins; `index` is the number of its buckets and `num_bytes` that of all their bytes."""
    BUCKET = 2
    """A bucket follows, with one hash a chunk."""
    SEAL = 3
    """The version ends; what follows (digests, or nothing) has one hash."""


@dataclass(frozen=True, slots=True)
class Header:
    """See the module."""

    kind: Kind
    rank: int
    generation: int
    version: Version
    fingerprint: int
    index: int
    num_bytes: int
    hashes: tuple[bytes, ...] = ()


def encode_header(header: Header) -> bytes:
    """`HEADER_BYTES` bytes."""
    assert len(header.hashes) <= MAX_CHUNKS_A_BUCKET and all(len(h) == HASH_BYTES for h in header.hashes)
    fixed = _FIXED.pack(
        *(_MAGIC, _FORM, header.kind, header.rank, header.generation, header.version.epoch, header.version.number),
        *(header.fingerprint, header.index, header.num_bytes, len(header.hashes), 0),
    )
    body = (fixed + b"".join(header.hashes)).ljust(HEADER_BYTES - _CHECK.size, b"\0")
    return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))


def decode_header(raw: bytes | memoryview) -> Header:
    """The header in `raw`; `WireError` when it is anything else."""
    if len(raw) != HEADER_BYTES:
        raise WireError(f"a header of {len(raw)} bytes; every header has {HEADER_BYTES}")
    raw = bytes(raw)
    if not raw.startswith(_MAGIC):
        raise WireError(f"a broadcast that does not begin with a header of weightcast, but with {raw[:8]!r}")
    body, check = raw[: -_CHECK.size], _CHECK.unpack(raw[-_CHECK.size :])[0]
    if xxhash.xxh3_64_intdigest(body) != check:
        raise WireError("a header that does not have its own hash: its bytes were altered; not used")
    fields = _FIXED.unpack_from(body)
    _, form, kind, rank, generation, epoch, number, fingerprint, index, num_bytes, num_hashes, zero = fields
    if form != _FORM or zero or kind not in Kind.__members__.values():
        raise WireError(f"a header of form {form} and kind {kind}; known are form {_FORM} and kinds {list(Kind)}")
    end = _FIXED.size + HASH_BYTES * num_hashes
    if num_hashes > MAX_CHUNKS_A_BUCKET or any(body[end:]):
        raise WireError(f"a header with {num_hashes} hashes, or bytes after them; at most {MAX_CHUNKS_A_BUCKET}")
    hashes = tuple(body[at : at + HASH_BYTES] for at in range(_FIXED.size, end, HASH_BYTES))
    return Header(Kind(kind), rank, generation, Version(epoch, number), fingerprint, index, num_bytes, hashes)
