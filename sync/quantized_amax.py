"""Largest weights of blocks that lie on several regions, or on several ranks. Needs no sockets and no groups.

A box of a tensor can be quantised by itself only where it splits no block. Where tensor parallelism cuts elsewhere,
or one scale serves a whole matrix, or several, the largest weight of a block is that of all its holders: each rank
takes it over its own regions for all such tensors of the model at once, and one max-reduction of a few bytes a block,
which the trainer lends (`reduce_amax`), gives the same numbers to all.

    pool = AmaxPool(plan, held, reduce_amax)
    pool.take()          # once a version, every rank
    pool.amax(tensor)    # the whole grid of blocks
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, product

import torch

from weightcast.sync.errors import SourceError
from weightcast.sync.quantize import MIN_TENSOR_AMAX, Shape, block_amax, grid_box, on_block_borders
from weightcast.sync.quantize_rules import FP8_TENSOR, MIN_FUSED_AMAX, Fp8Plan, Quantized
from weightcast.sync.regions import HeldRegion, Region

logger = logging.getLogger(__name__)

ReduceAmax = Callable[[torch.Tensor], None]
"""Replaces a flat fp32 tensor in host memory by its elementwise maximum over all ranks of the model."""

NOT_TAKEN = (
    "the largest weights of this version are not known: call `prepare()` on every rank after the step and "
    "before `publish`, once a version"
)


class AmaxPool:
    """The tensors of a plan whose blocks this rank cannot judge region by region, and their largest weights.

    With `reduce_amax` every rank must make one alike: it is called once here, to agree on the tensors, and once in
    each `take`. Raises `SourceError` when this rank holds a part of a block only and there is no `reduce_amax`.
    """

    def __init__(self, plan: Fp8Plan, held: Sequence[HeldRegion], reduce_amax: ReduceAmax | None) -> None:
        self._plan = plan
        self._reduce = reduce_amax
        self._held = [item for item in held if item.region.name in plan.quantized]
        self._groups = self._agree_on_groups()
        self._pooled = {name: tensor for name, tensor in plan.quantized.items() if tensor.group in self._groups}
        self._grids: dict[str, torch.Tensor] = {}
        self._own: dict[Region, torch.Tensor] = {}
        self.device = torch.device("cpu")
        """Where this rank's weights lie, once `take` has seen them; published scales lie there too."""
        self._has_warned = False
        if reduce_amax is None:
            self._check_complete()

    @property
    def is_reduced(self) -> bool:
        """Whether all ranks know all of the pool's numbers."""
        return self._reduce is not None

    def __contains__(self, name: str) -> bool:
        return name in self._pooled

    def __len__(self) -> int:
        return len(self._pooled)

    def _agree_on_groups(self) -> frozenset[str]:
        """Groups with several members, or with a region that splits a block on any rank (on this one without a
        reduction)."""
        sizes = Counter(tensor.group for tensor in self._plan.quantized.values())
        split = {group for group, size in sizes.items() if size > 1}
        for item in self._held:
            tensor, region = self._plan.quantized[item.region.name], item.region
            if not on_block_borders(region.offset, region.shape, tensor.source.shape, tensor.block):
                split.add(tensor.group)
        if self._reduce is None or not sizes:
            return frozenset(split)
        flags = torch.tensor([float(group in split) for group in sizes])
        self._reduce(flags)
        return frozenset(group for group, flag in zip(sizes, flags.tolist(), strict=True) if flag > 0)

    def _check_complete(self) -> None:
        """Every block that this rank holds a part of, it must hold whole, in all matrices that share its scale."""
        regions = self.regions_by_name()
        touched = {self._pooled[name].group for name in regions}
        sizes = Counter(tensor.group for tensor in self._pooled.values())
        for name, tensor in self._pooled.items():
            if tensor.group not in touched:
                continue
            counts, whole = count_held(tensor, regions.get(name, [])), count_held(tensor, [tensor.source.whole()])
            partly = (counts < whole) & ((counts > 0) | (sizes[tensor.group] > 1))
            if bool(partly.any()):
                raise SourceError(
                    f"{name} {tensor.source.shape}: this rank holds {int(counts.sum())} of {int(whole.sum())} weights, "
                    f"and {int(partly.sum())} block(s) of {tensor.block[0]} x {tensor.block[1]}, with one scale each, "
                    "are partly on other ranks. Give `reduce_amax`, a max-reduction over the ranks of the model, or "
                    "choose fp8_block and a layout that cuts at multiples of 128"
                )

    def regions_by_name(self) -> dict[str, list[Region]]:
        """The regions of pooled tensors that this rank holds, without duplicates."""
        regions: dict[str, dict[Region, None]] = {}
        for item in self._held:
            if item.region.name in self._pooled:
                regions.setdefault(item.region.name, {})[item.region] = None
        return {name: list(found) for name, found in regions.items()}

    def take(self) -> None:
        """Find the largest weights of this version. With `reduce_amax` a collective of all ranks.

        Raises `SourceError` when a weight is not finite, or so small that it has no scale.
        """
        own = [item for item in self._held if item.region.name in self._pooled]
        amax = [self.measure(item.region, item.live()) for item in own]
        if amax:
            self.device = amax[0].device
        self._own = dict(zip((item.region for item in own), _to_host(amax), strict=True))
        grids = {name: torch.zeros(tensor.grid) for name, tensor in self._pooled.items()}
        for region, found in self._own.items():
            tensor = self._pooled[region.name]
            _max_into(grids[region.name], *grid_box(region.offset, region.shape, tensor.block), found)
        if self._reduce is not None and grids:
            flat = torch.cat([grid.flatten() for grid in grids.values()])
            self._reduce(flat)
            parts = torch.split(flat, [grid.numel() for grid in grids.values()])
            grids = {name: part.view_as(grids[name]) for name, part in zip(grids, parts, strict=True)}
        self._share_in_groups(grids)
        self.check_finite(grids)
        self._warn_of_small(grids)
        self._grids = grids

    def _share_in_groups(self, grids: dict[str, torch.Tensor]) -> None:
        shared: dict[str, torch.Tensor] = {}
        for name, grid in grids.items():
            group = self._pooled[name].group
            shared[group] = torch.maximum(shared[group], grid) if group in shared else grid
        for name in grids:
            grids[name] = shared[self._pooled[name].group]

    def _warn_of_small(self, grids: Mapping[str, torch.Tensor]) -> None:
        if self._plan.scheme.kind != FP8_TENSOR:
            return
        small = [
            name for name, grid in grids.items() if self._pooled[name].group != name and 0 < grid.max() < MIN_FUSED_AMAX
        ]
        if small and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s and %d more have no weight above %g: vLLM, which quantises fused matrices again while it loads "
                "them, loses their smallest codes; fp8_block has no such limit",
                small[0],
                len(small) - 1,
                MIN_FUSED_AMAX,
            )

    def check_finite(self, grids: Mapping[str, torch.Tensor]) -> None:
        """Raise `SourceError` for largest weights that give no scale."""
        if not grids:
            return
        flat = torch.cat([grid.flatten() for grid in grids.values()])
        tiny = (flat > 0) & (flat < MIN_TENSOR_AMAX) & (self._plan.scheme.kind == FP8_TENSOR)
        if bool((torch.isfinite(flat) & ~tiny).all()):
            return
        for name, grid in grids.items():
            if not bool(torch.isfinite(grid).all()):
                raise SourceError(
                    f"{name} has weights that are NaN or infinite; FP8 has no code for them: this version is not "
                    "published, look at the step that made them"
                )
            if bool(((grid > 0) & (grid < MIN_TENSOR_AMAX)).any()):
                raise SourceError(
                    f"{name}: the largest weight is {float(grid.max()):g}, and below {MIN_TENSOR_AMAX:g} no fp32 scale "
                    "is exact; publish it as it is (`keep`)"
                )

    def measure(self, region: Region, live: torch.Tensor) -> torch.Tensor:
        """Largest weights of the blocks that a region touches, on its device, as the engine would see them."""
        weights = live.detach().to(self._plan.scheme.dtype)
        return block_amax(weights, region.offset, self._plan.quantized[region.name].block)

    def amax(self, name: str) -> torch.Tensor:
        """The largest weights of all blocks of a pooled tensor, in host memory; those that no rank holds are 0.

        Raises `SourceError` before the first `take`.
        """
        if name not in self._grids:
            raise SourceError(f"{name}: {NOT_TAKEN}")
        return self._grids[name]

    def check_fresh(self, region: Region, weights: torch.Tensor) -> None:
        """Raise `SourceError` when the weights behind a pooled region are not those of the last `take`."""
        name = region.name
        self.amax(name)
        now = block_amax(weights, region.offset, self._pooled[name].block)
        if not torch.equal(now.cpu(), self._own[region]):
            raise SourceError(f"{region} has changed since `prepare()`; {NOT_TAKEN}")


def _to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Small tensors in host memory, with one copy a device instead of one a tensor."""
    found: dict[int, torch.Tensor] = {}
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(index)
    for indices in by_device.values():
        flat = torch.cat([tensors[index].flatten() for index in indices]).cpu()
        parts = torch.split(flat, [tensors[index].numel() for index in indices])
        found |= {index: part.view(tensors[index].shape) for index, part in zip(indices, parts, strict=True)}
    return [found[index] for index in range(len(tensors))]


def _max_into(grid: torch.Tensor, first: Shape, shape: Shape, found: torch.Tensor) -> None:
    box = tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))
    grid[box] = torch.maximum(grid[box], found)


def count_held(tensor: Quantized, regions: Iterable[Region]) -> torch.Tensor:
    """Weights of each block that lie in `regions`, which do not overlap; of the shape of the tensor's grid."""
    counts = torch.zeros(tensor.grid, dtype=torch.int64)
    for region in regions:
        rows, columns = (_reach(region.offset[d], region.shape[d], tensor.block[d], tensor.grid[d]) for d in (-2, -1))
        lead = tuple(slice(s, s + n) for s, n in zip(region.offset[:-2], region.shape[:-2], strict=True))
        counts[lead] += rows.unsqueeze(1) * columns
    return counts


def _reach(start: int, size: int, block: int, num_blocks: int) -> torch.Tensor:
    """How far a span reaches into each block of a dimension."""
    borders = torch.arange(num_blocks) * block
    return ((borders + block).clamp(max=start + size) - borders.clamp(min=start)).clamp(min=0)


def touched_boxes(tensor: Quantized, regions: Iterable[Region]) -> Iterator[tuple[Shape, Shape]]:
    """Boxes (offset, shape) of the grid that cover the blocks in `regions` once each: for the same blocks the same
    boxes, however the regions are cut."""
    touched = count_held(tensor, regions) > 0
    for lead in product(*(range(size) for size in tensor.grid[:-2])):
        open_runs: dict[tuple[int, int], int] = {}  # columns of a box, and the row where it began
        for row in range(tensor.grid[-2] + 1):
            runs = _runs(touched[(*lead, row)].tolist()) if row < tensor.grid[-2] else set()
            for columns in sorted(open_runs.keys() - runs):
                first = open_runs.pop(columns)
                shape = (*(1 for _ in lead), row - first, columns[1] - columns[0])
                yield (*lead, first, columns[0]), shape
            open_runs |= {columns: row for columns in runs - open_runs.keys()}


def _runs(row: list[bool]) -> set[tuple[int, int]]:
    """Spans of neighbours that are true."""
    ends = [index for index, (a, b) in enumerate(pairwise([False, *row, False])) if a != b]
    return set(zip(ends[::2], ends[1::2], strict=True))
