"""Parcels: which rank sends which regions, batch by batch, so that no batch exceeds a number of bytes.

A rank that serves regions packs them into one flat buffer, its parcel, however many regions there are. Where it goes
follows from who holds what, so every rank computes the same and no header travels: to one writer of a file as here,
or to every rank that wants full tensors (`export_batches.py`).

    routes = Routes.make(plan.specs, holdings)
    for batch in split_batches(file.specs, max_bytes=256 * 2**20):
        for parcel in routes.parcels(batch, to=file.writer):
            print(parcel.source, parcel.num_bytes)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from weightcast.sync.assignment import assign_regions
from weightcast.sync.regions import HeldRegion, Region, TensorSpec

# Regions in a parcel start at multiples of this, so that a view of any dtype is aligned.
ALIGNMENT_BYTES = 16


def round_up(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT_BYTES`."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class LiveRegions:
    """The present values of the regions that a rank holds, and of parts of them."""

    def __init__(self, held: Iterable[HeldRegion]) -> None:
        self._live: dict[str, dict[Region, Callable[[], torch.Tensor]]] = {}
        for item in held:
            self._live.setdefault(item.region.name, {})[item.region] = item.live

    def __call__(self, region: Region) -> torch.Tensor:
        """A view of the parameter behind `region`, which lies within a region that is held."""
        mine = self._live[region.name]
        if region in mine:
            return mine[region]()
        whole = next(held for held in mine if _contains(held, region))
        start = [inner - outer for inner, outer in zip(region.offset, whole.offset, strict=True)]
        return mine[whole]()[Region(region.name, tuple(start), region.shape).slices]


@dataclass(frozen=True, slots=True)
class Parcel:
    """Regions that one rank packs into one buffer; `starts_bytes` are their places in it."""

    source: int
    regions: tuple[Region, ...]
    dtypes: tuple[torch.dtype, ...]
    starts_bytes: tuple[int, ...]
    num_bytes: int

    @staticmethod
    def make(source: int, regions: Sequence[Region], dtypes: Mapping[str, torch.dtype]) -> "Parcel":
        """Lay out `regions` one after the other; `dtypes` are those of the HF tensors."""
        kinds = tuple(dtypes[region.name] for region in regions)
        sizes = [round_up(region.numel * dtype.itemsize) for region, dtype in zip(regions, kinds, strict=True)]
        *starts, total = accumulate(sizes, initial=0)
        return Parcel(source, tuple(regions), kinds, tuple(starts), total)

    def views(self, buffer: torch.Tensor) -> Iterator[tuple[Region, torch.Tensor]]:
        """Each region and its place in `buffer`, a flat uint8 tensor of `num_bytes`."""
        for region, dtype, start in zip(self.regions, self.dtypes, self.starts_bytes, strict=True):
            raw = buffer[start : start + region.numel * dtype.itemsize]
            yield region, raw.view(dtype).view(region.shape)

    def pack(self, live: LiveRegions, device: torch.device) -> torch.Tensor:
        """A buffer on `device` with the present values of the regions, cast to the HF tensors' dtypes."""
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        self.pack_into(buffer, live)
        return buffer

    @torch.no_grad()
    def pack_into(self, buffer: torch.Tensor, live: LiveRegions) -> None:
        """As `pack`, into `buffer`, a flat uint8 tensor of `num_bytes`."""
        for region, view in self.views(buffer):
            view.copy_(live(region))

    def unpack(self, buffer: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the regions from `buffer` into full `tensors`, by name."""
        for region, view in self.views(buffer):
            tensors[region.name][region.slices].copy_(view)


@dataclass(frozen=True, slots=True)
class Routes:
    """Who sends each region of the model, when several ranks hold it."""

    senders: Mapping[str, tuple[tuple[Region, int], ...]]
    holdings: Mapping[int, frozenset[Region]]
    dtypes: Mapping[str, torch.dtype]

    @staticmethod
    def make(specs: Sequence[TensorSpec], holdings: Mapping[int, Sequence[Region]]) -> "Routes":
        """Spread the regions over their holders by bytes. Raises `SourceError` unless they make a whole model."""
        senders: dict[str, list[tuple[Region, int]]] = {spec.name: [] for spec in specs}
        for rank, regions in assign_regions(specs, holdings).items():
            for region in regions:
                senders[region.name].append((region, rank))
        return Routes(
            senders={name: tuple(sorted(pairs)) for name, pairs in senders.items()},
            holdings={rank: frozenset(regions) for rank, regions in holdings.items()},
            dtypes={spec.name: spec.dtype for spec in specs},
        )

    def parcels(self, specs: Sequence[TensorSpec], *, to: int | None = None) -> tuple[Parcel, ...]:
        """The parcels that make up the tensors `specs`, by rank of their source.

        With `to`, the rank that gathers them, whatever that rank holds itself comes from itself.
        """
        regions: dict[int, list[Region]] = {}
        kept = self.holdings.get(to, frozenset()) if to is not None else frozenset()
        for spec in specs:
            for region, sender in self.senders[spec.name]:
                source = to if to is not None and region in kept else sender
                regions.setdefault(source, []).append(region)
        return tuple(Parcel.make(source, regions[source], self.dtypes) for source in sorted(regions))


def split_batches(specs: Sequence[TensorSpec], max_bytes: int) -> tuple[tuple[TensorSpec, ...], ...]:
    """`specs` in order, in runs of at most `max_bytes`; a tensor larger than that is a run of its own."""
    batches: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not batches or spec.num_bytes > room:
            batches.append([])
            room = max_bytes
        batches[-1].append(spec)
        room -= spec.num_bytes
    return tuple(tuple(batch) for batch in batches)


def _contains(outer: Region, inner: Region) -> bool:
    return all(
        first.start <= second.start and second.stop <= first.stop
        for first, second in zip(outer.slices, inner.slices, strict=True)
    )
