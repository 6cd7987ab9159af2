"""QuantizedSource: any source, published as FP8 codes and scales.

It lists what an FP8 checkpoint of the model would hold, under the names that vLLM and SGLang look for, and makes it
from the live weights, on their own device, when the publisher packs. What an engine gets is bit for bit what it would
have made of the bf16 weights, at half the bytes.

    source = QuantizedSource(bridge.weight_source(model), Fp8Scheme(kind="fp8_block"), reduce_amax=reduce_over_ranks)
    source.engine_config()                 # once, for the engine's config.json
    with WeightPublisher(source, address) as publisher:
        source.prepare()                   # after each step, on every rank
        publisher.publish(version=1)

A region is quantised without its neighbours, so no weight travels between ranks. Only where blocks that share a scale
lie on several regions (a cut off the multiples of 128, one scale a tensor) `prepare` takes the largest weights of all
such tensors together, and reduces them once over the ranks: four bytes a block (`quantized_amax`).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from weightcast.sync.quantize import Shape, block_amax, grid_box, quantize, scales_of, tensor_scales_of
from weightcast.sync.quantize_rules import FP8_BLOCK, Fp8Scheme, Quantized, plan_fp8
from weightcast.sync.quantized_amax import AmaxPool, ReduceAmax, touched_boxes
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.source import WeightSource


class QuantizedSource:
    """A `WeightSource` over another one. Every rank of the model makes one, with an equal scheme.

    `reduce_amax` replaces a flat fp32 tensor in host memory by its elementwise maximum over all ranks; with it, making
    a source and each `prepare` are collectives. Without it no rank talks to another, and layouts that would need it
    are refused with `SourceError`. Raises `ConfigError` for a model that the scheme's rules do not fit.
    """

    def __init__(self, source: WeightSource, scheme: Fp8Scheme, *, reduce_amax: ReduceAmax | None = None) -> None:
        self.rank = source.rank
        self.world_size = source.world_size
        self.plan = plan_fp8(source.specs(), scheme)
        self._inner = tuple(source.held())
        self._pool = AmaxPool(self.plan, self._inner, reduce_amax)
        self._held = tuple({item.region: item for item in self._make_held()}.values())

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor as published, in HF order, scales behind their codes."""
        return self.plan.specs

    def held(self) -> Sequence[HeldRegion]:
        """Codes and scales of this rank's regions. Reading one raises `SourceError` for weights that are not finite,
        and, where `needs_prepare`, without a `prepare` since the weights changed."""
        return self._held

    def engine_config(self) -> dict[str, Any]:
        """The entries of `config.json` with which an engine reads what is published (`Fp8Plan.engine_config`)."""
        return self.plan.engine_config()

    @property
    def needs_prepare(self) -> bool:
        """Whether `prepare` has anything to do; the same on every rank with `reduce_amax`."""
        return len(self._pool) > 0

    def prepare(self) -> None:
        """Take the largest weights of blocks that lie on several regions. Every rank calls it, once a version, after
        the step. Raises `SourceError` for weights that are not finite."""
        if self.needs_prepare:
            self._pool.take()

    def _make_held(self) -> Iterator[HeldRegion]:
        for item in self._inner:
            tensor = self.plan.quantized.get(item.region.name)
            if tensor is None:
                yield item
                continue
            yield HeldRegion(item.region, partial(self._codes, item), is_made=True)
            if item.region.name not in self._pool:
                box = grid_box(item.region.offset, item.region.shape, tensor.block)
                yield HeldRegion(_scale_region(tensor, *box), partial(self._own_scales, item))
        yield from self._pooled_scales()

    def _pooled_scales(self) -> Iterator[HeldRegion]:
        """All ranks know the scales after a reduction and offer them whole; without one, those of their own blocks."""
        regions = self._pool.regions_by_name()
        for name, tensor in self.plan.quantized.items():
            if name not in self._pool:
                continue
            zeros = tuple(0 for _ in tensor.grid)
            boxes = [(zeros, tensor.grid)] if self._pool.is_reduced else touched_boxes(tensor, regions.get(name, []))
            for box in boxes:
                yield HeldRegion(_scale_region(tensor, *box), partial(self._shared_scales, tensor, *box))

    def _codes(self, item: HeldRegion) -> torch.Tensor:
        region = item.region
        tensor = self.plan.quantized[region.name]
        weights = item.live().detach().to(self.plan.scheme.dtype)
        if region.name in self._pool:
            self._pool.check_fresh(region, weights)
            amax = _cut(self._pool.amax(region.name), *grid_box(region.offset, region.shape, tensor.block))
            amax = amax.to(weights.device)
        else:
            amax = block_amax(weights, region.offset, tensor.block)
            self._pool.check_finite({region.name: amax})
        return quantize(weights, self._scales(amax), region.offset, tensor.block)

    def _own_scales(self, item: HeldRegion) -> torch.Tensor:
        amax = self._pool.measure(item.region, item.live())
        self._pool.check_finite({item.region.name: amax})
        return self._as_published(self._scales(amax))

    def _shared_scales(self, tensor: Quantized, first: Shape, shape: Shape) -> torch.Tensor:
        amax = _cut(self._pool.amax(tensor.source.name), first, shape).to(self._pool.device)
        return self._as_published(self._scales(amax))

    def _scales(self, amax: torch.Tensor) -> torch.Tensor:
        scheme = self.plan.scheme
        return scales_of(amax, scheme.division) if scheme.kind == FP8_BLOCK else tensor_scales_of(amax)

    def _as_published(self, scales: torch.Tensor) -> torch.Tensor:
        return scales if self.plan.scheme.kind == FP8_BLOCK else scales[..., 0, 0]


def _scale_region(tensor: Quantized, first: Shape, shape: Shape) -> Region:
    """A box of the grid as a region of the published scales: without the last two dimensions where one is for all."""
    num_dims = len(tensor.scales.shape)
    return Region(tensor.scales.name, first[:num_dims], shape[:num_dims])


def _cut(grid: torch.Tensor, first: Shape, shape: Shape) -> torch.Tensor:
    return grid[tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))]
