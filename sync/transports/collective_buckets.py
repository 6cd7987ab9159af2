"""Bucket plans: how a source's chunks are put together for broadcasts. Pure.

A broadcast of many small tensors costs its latency many times over; one of everything at once costs a second copy of
the model. Buckets lie between: chunks, in order and back to back as in a source's arena, up to a cap in bytes. Both
ends compute the same plan from the chunks' sizes, which follow from the layout, so no table of offsets travels, and a
fingerprint of the sizes shows at once when they do not agree.

    plan = plan_buckets([chunk.num_bytes for chunk in chunks], bucket_bytes=32 << 20)
    for bucket in plan.buckets:
        payload = arena[bucket.start_byte : bucket.start_byte + bucket.num_bytes]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from weightcast.sync.chunks import MAX_CHUNK_BYTES
from weightcast.sync.errors import ConfigError

MIN_BUCKET_BYTES = 4096
MAX_BUCKET_BYTES = 4 << 30
# Gloo reached its full rate on loopback from 4 MiB on; with 32 MiB its latency is below one part in a hundred.
DEFAULT_BUCKET_BYTES = 32 << 20
# A bucket's header has a fixed size and a hash a chunk: see `collective_header`.
MAX_CHUNKS_A_BUCKET = 240


@dataclass(frozen=True, slots=True)
class Slot:
    """A chunk's place in a bucket."""

    index: int
    start_byte: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """What one broadcast carries; `start_byte` is where it begins when all chunks lie back to back."""

    index: int
    start_byte: int
    num_bytes: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """All buckets of a source's part of a version, in the order in which they are sent."""

    buckets: tuple[Bucket, ...]
    num_bytes: int
    num_chunks: int
    fingerprint: int

    @property
    def largest_bytes(self) -> int:
        """What one buffer for buckets must hold; 0 when there is nothing to send."""
        return max((bucket.num_bytes for bucket in self.buckets), default=0)


def check_bucket_bytes(bucket_bytes: int, chunk_bytes: int = MIN_BUCKET_BYTES) -> int:
    """`bucket_bytes` itself, or `ConfigError` when it is out of range or below `chunk_bytes`, the largest chunk."""
    lowest = max(MIN_BUCKET_BYTES, chunk_bytes)
    if not lowest <= bucket_bytes <= MAX_BUCKET_BYTES:
        raise ConfigError(
            f"bucket_bytes must be from {lowest} (the largest chunk) to {MAX_BUCKET_BYTES}, got {bucket_bytes}; "
            f"{max(DEFAULT_BUCKET_BYTES, lowest)} is a good choice"
        )
    return bucket_bytes


def plan_buckets(chunk_sizes: Sequence[int], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> BucketPlan:
    """Put chunks of `chunk_sizes` bytes, in order, into buckets of at most `bucket_bytes`.

    Raises `ConfigError` when a chunk is larger than a bucket, and `ValueError` for sizes that no chunk has.
    """
    for size in chunk_sizes:
        if not 0 < size <= MAX_CHUNK_BYTES:
            raise ValueError(f"a chunk of {size} bytes: chunks have 1 to {MAX_CHUNK_BYTES}; lay them out again")
    check_bucket_bytes(bucket_bytes, max(chunk_sizes, default=MIN_BUCKET_BYTES))
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    used = start = 0
    for index, size in enumerate(chunk_sizes):
        if slots and (used + size > bucket_bytes or len(slots) == MAX_CHUNKS_A_BUCKET):
            buckets.append(Bucket(len(buckets), start, used, tuple(slots)))
            start, used, slots = start + used, 0, []
        slots.append(Slot(index, used, size))
        used += size
    if slots:
        buckets.append(Bucket(len(buckets), start, used, tuple(slots)))
    fingerprint = fingerprint_sizes(chunk_sizes, bucket_bytes)
    return BucketPlan(tuple(buckets), start + used, len(chunk_sizes), fingerprint)


def fingerprint_sizes(chunk_sizes: Sequence[int], bucket_bytes: int) -> int:
    """64 bits that name a plan: the same on any machine, other ones for other sizes, orders or caps."""
    return xxhash.xxh3_64_intdigest(np.array([bucket_bytes, *chunk_sizes], "<u8").tobytes())
