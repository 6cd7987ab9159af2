"""The layout of broadcasts: which source sends what, in which chunks and buckets. Pure.

Every source says what it holds; from what all of them say, every member computes the same layout.

    layout = make_layout({0: offer, 1: offer})
    layout.plans[1].buckets                      # what source rank 1 broadcasts, in order
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weightcast.sync.assignment import assign_regions
from weightcast.sync.chunks import Chunk, check_chunk_bytes, lay_out_chunks
from weightcast.sync.errors import ConfigError, ModelMismatch, SourceError, WireError
from weightcast.sync.regions import Region, TensorSpec, check_unique_names
from weightcast.sync.source import WeightSource
from weightcast.sync.transports.collective_buckets import BucketPlan, check_bucket_bytes, plan_buckets
from weightcast.sync.transports.collective_roster import Offer
from weightcast.sync.version import fingerprint


@dataclass(frozen=True, slots=True)
class CollectiveLayout:
    """What each source sends, by its rank; the same on every member."""

    epoch: int
    chunk_bytes: int
    specs: tuple[TensorSpec, ...]
    regions: Mapping[int, tuple[Region, ...]]
    chunks: Mapping[int, tuple[Chunk, ...]]
    plans: Mapping[int, BucketPlan]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Each tensor's element type."""
        return {spec.name: spec.dtype for spec in self.specs}


def make_offer(source: WeightSource, chunk_bytes: int, bucket_bytes: int, epoch: int) -> Offer:
    """What a source tells the others of itself. Raises `ConfigError` for sizes that are out of range."""
    check_chunk_bytes(chunk_bytes)
    check_bucket_bytes(bucket_bytes, chunk_bytes)
    specs = tuple(source.specs())
    check_unique_names(specs)
    return Offer(
        rank=source.rank,
        world_size=source.world_size,
        epoch=epoch,
        model=fingerprint(specs),
        chunk_bytes=chunk_bytes,
        bucket_bytes=bucket_bytes,
        specs=specs if source.rank == 0 else (),
        regions=tuple(dict.fromkeys(held.region for held in source.held())),
    )


def make_layout(offers: Mapping[int, Offer]) -> CollectiveLayout:
    """The layout of the sources in `offers`, by their ranks.

    Raises `ModelMismatch` when they speak of different models or cut them differently, `SourceError` when what they
    hold together is not the whole model, `WireError` when the first gives sizes that are out of range.
    """
    first = offers[0]
    for rank, offer in offers.items():
        settings = (offer.model, offer.chunk_bytes, offer.bucket_bytes, offer.world_size)
        if settings != (first.model, first.chunk_bytes, first.bucket_bytes, first.world_size) or offer.rank != rank:
            raise ModelMismatch(
                f"source rank {rank} has the model {offer.model[:8]} in chunks of {offer.chunk_bytes} and buckets of "
                f"{offer.bucket_bytes} bytes among {offer.world_size} sources, rank 0 {first.model[:8]}, "
                f"{first.chunk_bytes}, {first.bucket_bytes} and {first.world_size}; start all with the same"
            )
    try:
        check_chunk_bytes(first.chunk_bytes)
        check_bucket_bytes(first.bucket_bytes, first.chunk_bytes)
        check_unique_names(first.specs)
    except (ConfigError, SourceError) as error:
        raise WireError(f"source rank 0: {error}") from None
    regions = assign_regions(first.specs, {rank: offer.regions for rank, offer in offers.items()})
    return _cut(first, regions)


def _cut(first: Offer, regions: Mapping[int, Sequence[Region]]) -> CollectiveLayout:
    dtypes = {spec.name: spec.dtype for spec in first.specs}
    chunks = {rank: lay_out_chunks(rows, dtypes, first.chunk_bytes) for rank, rows in regions.items()}
    plans = {rank: plan_buckets([chunk.num_bytes for chunk in row], first.bucket_bytes) for rank, row in chunks.items()}
    served = {rank: tuple(rows) for rank, rows in regions.items()}
    return CollectiveLayout(first.epoch, first.chunk_bytes, first.specs, served, chunks, plans)
