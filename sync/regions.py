"""Regions: the one thing that moves.

A region is a box of an HF tensor, in that tensor's own coordinates: a name, an offset and a shape. Trainer
ranks, files and engine workers each hold some regions and want others; everything else in weightcast is
written in these words.

    spec = TensorSpec("model.norm.weight", torch.bfloat16, (2048,))
    half = Region("model.norm.weight", offset=(0,), shape=(1024,))
    held = HeldRegion(half, lambda: module.norm.weight.data[:1024])
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from weightcast.sync.errors import SourceError

# Names of dtypes as vLLM, SGLang and torch print them; also the allow-list of what may cross a wire.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    )
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What an HF tensor is: its name, element type and full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize

    def whole(self) -> "Region":
        """The region that covers all of this tensor."""
        return Region(self.name, (0,) * len(self.shape), self.shape)


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A box of an HF tensor: `offset` and `shape` have one entry a dimension, in elements."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """An index for the full tensor: `tensor[region.slices]` has `region.shape`."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def __str__(self) -> str:
        if len(self.offset) != len(self.shape):
            return f"{self.name}[offset {self.offset}, shape {self.shape}]"
        spans = ", ".join(f"{s.start}:{s.stop}" for s in self.slices)
        return f"{self.name}[{spans}]"


@dataclass(frozen=True, slots=True)
class HeldRegion:
    """A region together with the live memory behind it.

    `live` returns the parameter's values, of the region's shape, at the moment of the call: distributed optimizers
    re-point `param.data` into buffers of their own, so a tensor must never be kept. It is a view of the parameter, or
    a new tensor where no view has the region's layout. It may be strided, on any device, and of another floating dtype
    than the tensor's spec; whoever packs it casts. `is_made` says that each call makes a new tensor, of much memory:
    few are asked for at a time.
    """

    region: Region
    live: Callable[[], torch.Tensor]
    is_made: bool = False


def find_tiling_fault(spec: TensorSpec, regions: Iterable[Region]) -> str | None:
    """Why `regions` do not cover `spec` exactly once each; `None` when they do.

    Duplicates of one region (replicas) must be removed before. Pure.
    """
    boxes = sorted(regions)
    for box in boxes:
        if fault := _find_box_fault(spec, box):
            return fault
    covered = sum(box.numel for box in boxes)
    if overlap := _find_overlap(boxes):
        return f"{overlap[0]} overlaps {overlap[1]}"
    if covered != spec.numel:
        return f"{covered} of {spec.numel} elements are held"
    return None


def _find_box_fault(spec: TensorSpec, box: Region) -> str | None:
    if len(box.shape) != len(spec.shape) or len(box.offset) != len(spec.shape):
        return f"{box} has {len(box.shape)} dimensions, the tensor has {len(spec.shape)}"
    for start, size, limit in zip(box.offset, box.shape, spec.shape, strict=True):
        if start < 0 or size < 0 or start + size > limit:
            return f"{box} reaches outside the tensor's shape {spec.shape}"
    return None


def _find_overlap(boxes: list[Region]) -> tuple[Region, Region] | None:
    """Two boxes that share an element.

    A sweep along the dimension that is cut most often: only boxes that reach past the next one's start are compared.
    """
    if not boxes or not boxes[0].shape:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    dim = max(range(len(boxes[0].shape)), key=lambda d: len({box.offset[d] for box in boxes}))
    boxes = sorted(boxes, key=lambda box: box.offset[dim])
    for index, box in enumerate(boxes):
        end = box.offset[dim] + box.shape[dim]
        for other in boxes[index + 1 :]:
            if other.offset[dim] >= end:
                break
            if _share_an_element(box, other):
                return box, other
    return None


def _share_an_element(a: Region, b: Region) -> bool:
    return all(
        max(start_a, start_b) < min(start_a + size_a, start_b + size_b)
        for start_a, size_a, start_b, size_b in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )


def check_unique_names(specs: Iterable[TensorSpec]) -> None:
    """Raise `SourceError` when two specs have one name."""
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise SourceError(f"the tensor name {spec.name!r} is listed twice; every HF tensor has one name")
        seen.add(spec.name)
