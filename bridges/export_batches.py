"""Batches: the order in which an export visits the tensors, so that no rank has more in flight than a number of bytes.

All of it follows from who holds what and who wants it, so every rank computes the same batches and no header travels.
A region that every receiver holds itself does not travel at all; of the others each has one sender, a receiver if one
holds it, and otherwise the holder with the least to send so far.

A batch of B bytes costs a rank one buffer of B, where everybody's parcels come to lie side by side, and a tensor of at
most B that is being made of them. So B is half the limit. A tensor that is larger comes in pieces, in a smaller buffer
of their own: of what it leaves free of the limit, and at least a quarter of the limit. Beside what the caller keeps,

    bytes in flight on any rank <= max(limit, largest tensor + limit / 4)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from weightcast.bridges.parcels import ALIGNMENT_BYTES, Parcel, round_up
from weightcast.sync.assignment import assign_regions
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import Region, TensorSpec

MIN_IN_FLIGHT_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Place:
    """A region, and where it starts in the buffer of a receiver."""

    region: Region
    start_bytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole tensors, or a part of a single one."""

    receivers: tuple[int, ...]
    specs: tuple[TensorSpec, ...]
    local: Mapping[str, tuple[Region, ...]]
    """By tensor, regions that every receiver takes from itself."""
    parcels: Mapping[int, Parcel]
    """By rank, what it sends to every receiver."""
    piece_of: str | None = None
    """The tensor that this is only a part of."""
    completes: bool = True
    """False for a part that is not the last one."""

    @property
    def num_bytes(self) -> int:
        """All parcels together."""
        return sum(parcel.num_bytes for parcel in self.parcels.values())

    def starts_bytes(self) -> dict[int, int]:
        """Where each rank's parcel starts in the buffer of a receiver: one after the other, by rank."""
        sizes = [parcel.num_bytes for parcel in self.parcels.values()]
        return dict(zip(self.parcels, accumulate(sizes, initial=0), strict=False))

    def places(self) -> dict[str, list[Place]]:
        """The regions that travel, by tensor."""
        found: dict[str, list[Place]] = {spec.name: [] for spec in self.specs}
        for source, first_bytes in self.starts_bytes().items():
            parcel = self.parcels[source]
            for region, start_bytes in zip(parcel.regions, parcel.starts_bytes, strict=True):
                found[region.name].append(Place(region, first_bytes + start_bytes))
        return found


@dataclass(slots=True)
class _Planner:
    """Who holds what, pieces of regions included; `sent_bytes` counts what each rank sends from batch to batch."""

    receivers: tuple[int, ...]
    specs: Mapping[str, TensorSpec]
    holders: dict[Region, Sequence[int]]
    sent_bytes: dict[int, int]

    def make(
        self,
        specs: Sequence[TensorSpec],
        regions: Sequence[Region],
        *,
        piece_of: str | None = None,
        completes: bool = True,
    ) -> Batch:
        """A batch of `regions`, which are parts of `specs`."""
        local: dict[str, tuple[Region, ...]] = {}
        sent: dict[int, list[Region]] = {}
        in_batch: dict[int, int] = {}
        # Large regions first: the small ones then level what is left uneven.
        for region in sorted(regions, key=lambda region: -self.num_bytes(region)):
            if self.is_local(region):
                local[region.name] = (*local.get(region.name, ()), region)
                continue
            sender = min(
                self.holders[region],
                key=lambda rank: (rank not in self.receivers, in_batch.get(rank, 0), self.sent_bytes[rank], rank),
            )
            in_batch[sender] = in_batch.get(sender, 0) + self.num_bytes(region)
            self.sent_bytes[sender] += self.num_bytes(region)
            sent.setdefault(sender, []).append(region)
        dtypes = {spec.name: spec.dtype for spec in specs}
        parcels = {source: Parcel.make(source, sent[source], dtypes) for source in sorted(sent)}
        return Batch(self.receivers, tuple(specs), local, parcels, piece_of, completes)

    def num_bytes(self, region: Region) -> int:
        """Its place in a stream, in bytes."""
        return round_up(region.numel * self.specs[region.name].dtype.itemsize)

    def is_local(self, region: Region) -> bool:
        """Whether every receiver holds it."""
        return set(self.receivers) <= set(self.holders[region])

    def travelling_bytes(self, regions: Sequence[Region]) -> int:
        """What of `regions` has to be sent."""
        return sum(self.num_bytes(region) for region in regions if not self.is_local(region))

    def cut(self, spec: TensorSpec, regions: Sequence[Region], max_bytes: int) -> Iterator[Batch]:
        """The batches of one large tensor: first what does not travel, then pieces of at most `max_bytes`."""
        here = [region for region in regions if self.is_local(region)]
        pieces: list[Region] = []
        for region in regions:
            if not self.is_local(region):
                for piece in cut_region(
                    region, max(1, max_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES // spec.dtype.itemsize)
                ):
                    self.holders[piece] = self.holders[region]
                    pieces.append(piece)
        runs = list(_split(pieces, [self.num_bytes(piece) for piece in pieces], max_bytes)) or [[]]
        for index, run in enumerate(runs):
            last = index == len(runs) - 1
            yield self.make([spec], [*here, *run] if index == 0 else run, piece_of=spec.name, completes=last)


def plan_batches(
    specs: Sequence[TensorSpec],
    holdings: Mapping[int, Sequence[Region]],
    receivers: Sequence[int],
    max_in_flight_bytes: int,
) -> tuple[Batch, ...]:
    """The batches of an export of `specs` to the ranks `receivers`, in order. Pure.

    `holdings` are the regions of those tensors that every rank of the job holds. Raises `SourceError` unless they make
    whole tensors, `ConfigError` for a limit below `MIN_IN_FLIGHT_BYTES`.
    """
    if max_in_flight_bytes < MIN_IN_FLIGHT_BYTES:
        raise ConfigError(f"max_in_flight_bytes={max_in_flight_bytes}; give at least {MIN_IN_FLIGHT_BYTES}")
    assign_regions(specs, holdings)  # checks that they tile the tensors
    holders: dict[Region, list[int]] = {}
    for rank in sorted(holdings):
        for region in dict.fromkeys(holdings[rank]):
            if region.numel:
                holders.setdefault(region, []).append(rank)
    by_name: dict[str, list[Region]] = {spec.name: [] for spec in specs}
    for region in sorted(holders):
        by_name[region.name].append(region)
    planner = _Planner(
        tuple(sorted(receivers)), {spec.name: spec for spec in specs}, {**holders}, dict.fromkeys(holdings, 0)
    )
    return tuple(_visit(planner, specs, by_name, max_in_flight_bytes))


def _visit(
    planner: _Planner, specs: Sequence[TensorSpec], by_name: Mapping[str, list[Region]], limit_bytes: int
) -> Iterator[Batch]:
    batch_bytes = limit_bytes // 2
    run: list[TensorSpec] = []
    room = batch_bytes
    for spec in specs:
        travelling = planner.travelling_bytes(by_name[spec.name])
        is_large = max(spec.num_bytes, travelling) > batch_bytes
        if run and (is_large or travelling > room):
            yield planner.make(run, [region for one in run for region in by_name[one.name]])
            run, room = [], batch_bytes
        if is_large:
            free_bytes = max(limit_bytes - spec.num_bytes, limit_bytes // 4)
            yield from planner.cut(spec, by_name[spec.name], min(free_bytes, batch_bytes))
            continue
        run.append(spec)
        room -= travelling
    if run:
        yield planner.make(run, [region for one in run for region in by_name[one.name]])


def cut_region(region: Region, max_numel: int) -> Iterator[Region]:
    """`region` in boxes of at most `max_numel` elements, in order: as many rows at a time as fit, or parts of a row."""
    if region.numel <= max_numel:
        yield region
        return
    dim = next(index for index, size in enumerate(region.shape) if size > 1)
    step = max(1, max_numel * region.shape[dim] // region.numel)
    for start in range(0, region.shape[dim], step):
        offset, shape = list(region.offset), list(region.shape)
        offset[dim] += start
        shape[dim] = min(step, region.shape[dim] - start)
        yield from cut_region(Region(region.name, tuple(offset), tuple(shape)), max_numel)


def _split(items: Sequence[Region], sizes: Sequence[int], max_bytes: int) -> Iterator[list[Region]]:
    """Runs of items of at most `max_bytes` together."""
    run: list[Region] = []
    room = max_bytes
    for item, size in zip(items, sizes, strict=True):
        if run and size > room:
            yield run
            run, room = [], max_bytes
        run.append(item)
        room -= size
    if run:
        yield run
