"""The layout of a model over its sources, as a receiver believes it: who serves which chunk, and what is in it. Pure.

    layouts = read_layout(message, specs)       # or WireError
    layouts[rank].chunks[index].pieces

It is sent once and checked once, before a byte of tensor memory is taken: the regions offered must tile every tensor
exactly. All versions of one publisher have the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from weightcast.sync.chunk_delta import Part, list_parts
from weightcast.sync.chunks import Chunk, check_chunk_bytes, lay_out_chunks
from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.messages import Layout
from weightcast.sync.records import MAX_CHUNKS
from weightcast.sync.regions import Region, TensorSpec, find_tiling_fault


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """What one source serves: where to ask for it, its chunks, and where each begins in the source's arena."""

    rank: int
    address: str
    chunks: tuple[Chunk, ...]
    parts: tuple[tuple[Part, ...], ...] = field(repr=False)
    start_bytes: tuple[int, ...] = field(repr=False)

    def find_span(self, index: int, count: int = 1) -> tuple[int, int] | None:
        """(first byte, number of bytes) of neighbouring chunks in the source's memory; None past its end."""
        if index + count > len(self.chunks):
            return None
        return self.start_bytes[index], self.start_bytes[index + count] - self.start_bytes[index]


def read_layout(layout: Layout, specs: Sequence[TensorSpec]) -> Mapping[int, SourceLayout]:
    """The layout of every source by its rank, or `WireError` when the message contradicts itself or the model."""
    _check_regions(layout, specs)
    try:
        check_chunk_bytes(layout.chunk_bytes)
    except ConfigError as error:
        raise WireError(f"a layout of epoch {layout.epoch}: {error}") from None
    dtypes = {spec.name: spec.dtype for spec in specs}
    layouts: dict[int, SourceLayout] = {}
    for offer in layout.offers:
        # Before the layout is made, whose cost grows with what the regions claim to be.
        claimed_bytes = sum(region.numel * dtypes[region.name].itemsize for region in offer.regions)
        if claimed_bytes > MAX_CHUNKS * layout.chunk_bytes:
            raise WireError(
                f"a layout of epoch {layout.epoch}: source rank {offer.rank} offers {claimed_bytes} bytes, too many "
                f"for the {MAX_CHUNKS} chunks of {layout.chunk_bytes} bytes that a source may have"
            )
        chunks = lay_out_chunks(offer.regions, dtypes, layout.chunk_bytes)
        starts = accumulate((chunk.num_bytes for chunk in chunks), initial=0)
        parts = tuple(list_parts(chunk, dtypes) for chunk in chunks)
        layouts[offer.rank] = SourceLayout(offer.rank, offer.address, chunks, parts, tuple(starts))
    return layouts


def _check_regions(layout: Layout, specs: Sequence[TensorSpec]) -> None:
    by_name: dict[str, list[Region]] = {spec.name: [] for spec in specs}
    if len(by_name) != len(specs):
        raise WireError(f"a layout of epoch {layout.epoch}: the publisher lists a tensor name twice")
    ranks = [offer.rank for offer in layout.offers]
    if len(set(ranks)) != len(ranks):
        raise WireError(f"a layout of epoch {layout.epoch} lists a source rank twice: {sorted(ranks)}")
    for offer in layout.offers:
        for region in offer.regions:
            if region.name not in by_name:
                raise WireError(f"a layout of epoch {layout.epoch}: {region} is no tensor of the model")
            by_name[region.name].append(region)
    for spec in specs:
        if fault := find_tiling_fault(spec, by_name[spec.name]):
            raise WireError(f"a layout of epoch {layout.epoch} is incomplete: {spec.name}: {fault}")
