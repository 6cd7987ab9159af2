"""Dry runs: the plan of every rank of a layout that nobody owns yet, computed in one process without weights.

Megatron is asked for the shards of each seat (`dry_run_stages`); here the model's table of rules is laid over all of
them, and who serves what is assigned as a publisher would. Faults are collected instead of raised, so that one run
names everything that has to be mended.

    run = plan_layout(AutoBridge.from_hf_pretrained("path/to/hf"), Layout(tensor=8, pipeline=16, world_size=1024))
    print(run.held.largest, run.faults)
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.dry_run_layout import Layout, Seat
from weightcast.bridges.dry_run_stages import Box, apply_layout, read_seats
from weightcast.bridges.pieces import Piece, join_lanes, map_shard
from weightcast.bridges.rules import ModelDimensions, Rule, Segment, Tied, expand_rules, hf_shapes
from weightcast.bridges.standalone_mapped import dimensions_of
from weightcast.sync.assignment import assign_regions
from weightcast.sync.errors import SourceError, UnmappedTensor
from weightcast.sync.regions import Region, TensorSpec


@dataclass(frozen=True, slots=True)
class Faults:
    """What would stop a real run, by name; every field is empty where all is well."""

    unmapped_megatron: tuple[str, ...] = ()
    """Megatron tensors without a rule."""
    unfilled_hf: tuple[str, ...] = ()
    """HF tensors that no rule fills."""
    absent_hf: tuple[str, ...] = ()
    """HF tensors that a rule fills and the HF model lacks."""
    unmatched_rules: tuple[str, ...] = ()
    """Rules whose Megatron tensor no rank holds."""
    misfits: tuple[str, ...] = ()
    """Shapes that do not fit, in words."""
    incomplete: tuple[str, ...] = ()
    """Why the ranks' regions do not make a whole model, in words."""

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank holds and serves, in bytes of the HF model's dtypes."""

    rank: int
    seat: Seat
    num_regions: int
    held_bytes: int
    served_bytes: int


@dataclass(frozen=True, slots=True)
class DryRun:
    """The plans of all ranks of a layout, in numbers."""

    architecture: str
    layout: Layout
    num_tensors: int
    num_bytes: int
    largest_tensor: TensorSpec
    """What an export or a receiver must have in memory as a whole."""
    largest_region_bytes: int
    num_distinct_plans: int
    chosen: Mapping[str, int | str]
    """Megatron's settings that a real run needs besides the sizes, because its layers do not divide by its stages."""
    ranks: tuple[RankPlan, ...]
    serves: Mapping[int, tuple[Region, ...]]
    """What each rank serves; ranks that serve nothing may be missing."""
    faults: Faults
    seconds: float = field(compare=False)


@dataclass
class _Table:
    """A model's rules over its whole range of layers, with what laying them over boxes has found so far."""

    rules: Mapping[str, Rule]
    dimensions: ModelDimensions
    specs: Mapping[str, TensorSpec]
    copies: Mapping[str, str]
    keys: set[str] = field(default_factory=set)
    misfits: dict[str, str] = field(default_factory=dict)
    _segments: dict[str, Sequence[Segment]] = field(default_factory=dict)
    _pieces: dict[Box, tuple[tuple[Piece, None], ...]] = field(default_factory=dict)

    def lay(self, boxes: Iterable[Box]) -> tuple[Region, ...]:
        """The HF regions of `boxes`, each once, those of tied copies included."""
        pieces = (piece for box in boxes for piece in self._pieces_of(box))
        regions = dict.fromkeys(region for region, _ in join_lanes(pieces))
        for copy, original in self.copies.items():
            regions |= {Region(copy, r.offset, r.shape): None for r in regions if r.name == original}
        return tuple(regions)

    def _pieces_of(self, box: Box) -> tuple[tuple[Piece, None], ...]:
        if box not in self._pieces:
            self.keys.add(box.key)
            pieces = map_shard(self._segments_of(box), box.offset, box.shape)
            self._pieces[box] = tuple((piece, None) for piece in pieces)
        return self._pieces[box]

    def _segments_of(self, box: Box) -> Sequence[Segment]:
        """None for a key without a rule or of another shape than the HF model's; it is noted."""
        if box.key not in self._segments:
            self._segments[box.key] = ()
            rule = self.rules.get(box.key)
            if rule is not None:
                try:
                    segments = rule.segments(box.global_shape, self.dimensions)
                except UnmappedTensor as error:
                    self.misfits[box.key] = str(error)
                    return ()
                self._segments[box.key] = self._check(box, segments)
        return self._segments[box.key]

    def _check(self, box: Box, segments: Sequence[Segment]) -> Sequence[Segment]:
        for name, shape in hf_shapes(segments, box.global_shape).items():
            if name in self.specs and self.specs[name].shape != shape:
                self.misfits[box.key] = f"{name} has shape {self.specs[name].shape}, {box.key} makes {shape}"
                return ()
        return [segment for segment in segments if segment.hf in self.specs]

    def find_faults(self) -> Faults:
        """The faults in names; sees the whole model, so call it when every seat has been laid."""
        filled = {name for rule in self.rules.values() if not isinstance(rule, Tied) for name in rule.hf_names}
        return Faults(
            unmapped_megatron=tuple(sorted(self.keys - self.rules.keys())),
            unfilled_hf=tuple(name for name in self.specs if name not in filled and name not in self.copies),
            absent_hf=tuple(sorted(filled - self.specs.keys())),
            unmatched_rules=tuple(
                key for key, rule in self.rules.items() if key not in self.keys and not isinstance(rule, Tied)
            ),
            misfits=tuple(self.misfits.values()),
        )


def plan_layout(bridge: AutoBridge, layout: Layout) -> DryRun:
    """The plan of every rank of `layout` for the bridge's model; no weights are read or made.

    Needs a process without a process group. Raises `ConfigError` for a layout that the model cannot have.
    """
    start = time.perf_counter()
    provider = bridge.to_megatron_provider(load_weights=False)
    chosen = apply_layout(provider, layout)
    specs = bridge.hf_specs()
    rules = bridge.rules(specs)
    by_name = {spec.name: spec for spec in specs}
    expanded = expand_rules(rules, provider.num_layers)
    tied = [rule for rule in expanded.values() if isinstance(rule, Tied)]
    copies = {rule.copy: rule.hf for rule in tied if rule.copy is not None and rule.copy in by_name}
    table = _Table(expanded, dimensions_of(provider), by_name, copies)
    seats = {seat: table.lay(boxes) for seat, boxes in read_seats(provider, layout)}
    return _sum_up(bridge, layout, specs, seats, table.find_faults(), chosen, start)


def _sum_up(
    bridge: AutoBridge,
    layout: Layout,
    specs: Sequence[TensorSpec],
    seats: Mapping[Seat, tuple[Region, ...]],
    faults: Faults,
    chosen: Mapping[str, int | str],
    start: float,
) -> DryRun:
    itemsize = {spec.name: spec.dtype.itemsize for spec in specs}

    def num_bytes(regions: Iterable[Region]) -> int:
        return sum(region.numel * itemsize[region.name] for region in regions)

    held = {seat: num_bytes(regions) for seat, regions in seats.items()}
    served, incomplete = _assign(specs, {rank: seats[layout.seat(rank)] for rank in range(layout.num_ranks)})
    ranks = tuple(
        RankPlan(rank, seat, len(seats[seat]), held[seat], num_bytes(served.get(rank, ())))
        for rank, seat in ((rank, layout.seat(rank)) for rank in range(layout.num_ranks))
    )
    everything = {region for regions in seats.values() for region in regions}
    names: dict[str, Any] = {name: getattr(faults, name) for name in Faults.__slots__}
    return DryRun(
        architecture=", ".join(bridge.hf_config.architectures or ()),
        layout=layout,
        num_tensors=len(specs),
        num_bytes=sum(spec.num_bytes for spec in specs),
        largest_tensor=max(specs, key=lambda spec: spec.num_bytes),
        largest_region_bytes=max((num_bytes([region]) for region in everything), default=0),
        num_distinct_plans=len(seats),
        chosen=chosen,
        ranks=ranks,
        serves=served,
        faults=Faults(**names | {"incomplete": incomplete}),
        seconds=time.perf_counter() - start,
    )


def _assign(
    specs: Sequence[TensorSpec], holdings: Mapping[int, tuple[Region, ...]]
) -> tuple[Mapping[int, tuple[Region, ...]], tuple[str, ...]]:
    """Who serves what, or why nobody can."""
    try:
        return assign_regions(specs, holdings), ()
    except SourceError as error:
        return {}, (str(error),)
