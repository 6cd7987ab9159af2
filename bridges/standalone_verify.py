"""Compares two checkpoints of any kind, tensor by tensor and bit by bit, a block at a time.

Two of a kind are compared under their own names. A Megatron checkpoint beside an HF folder, or any two where a
configuration is given, are compared as HF tensors: layouts, paddings and spellings of layers then do not matter.

    differences = compare_checkpoints(Path("path/to/hf"), Path("checkpoints/qwen3"))
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.codecs import decode_checkpoint
from weightcast.bridges.config import model_dtype
from weightcast.bridges.progress import progress_bar
from weightcast.bridges.standalone_blocks import split_region
from weightcast.bridges.standalone_mapped import MappedCheckpoint
from weightcast.bridges.standalone_stores import DistStore, HFStore, Store, hf_store, open_store
from weightcast.sync.regions import TensorSpec, dtype_name


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not the same in both, and how."""

    name: str
    how: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found; the checkpoints are equal when `differences` is empty."""

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]
    num_cast: int
    """Tensors of two dtypes, whose values were compared in the wider one."""


def compare_checkpoints(
    a: Path, b: Path, *, config: AutoBridge | None = None, show_progress: bool = True
) -> Comparison:
    """Compare the checkpoints `a` and `b`; `config` is the bridge that says how Megatron's tensors map to HF's.

    Without it, the bridge of whichever of the two is an HF folder does. Raises `ConfigError`, `CheckpointMismatch`,
    `UnmappedTensor`.
    """
    with ExitStack() as stack:
        stores = [stack.enter_context(open_store(path)) for path in (a, b)]
        if config is None and {type(store) for store in stores} == {HFStore, DistStore}:
            config = AutoBridge.from_hf_pretrained(a if isinstance(stores[0], HFStore) else b)
        left, right = (stack.enter_context(_as_hf(store, config)) for store in stores)
        theirs = {spec.name: spec for spec in right.specs}
        ours = {spec.name: spec for spec in left.specs}
        differences = [Difference(name, f"only in {a}") for name in ours if name not in theirs]
        differences += [Difference(name, f"only in {b}") for name in theirs if name not in ours]
        both = [spec for spec in left.specs if spec.name in theirs]
        with progress_bar("comparing", len(both), show_progress) as advance:
            for spec in both:
                differences += _compare(left, right, spec, theirs[spec.name])
                advance(1)
        return Comparison(
            num_tensors=len(both),
            num_bytes=sum(spec.num_bytes for spec in both),
            differences=tuple(differences),
            num_cast=sum(_stored_dtype(left, spec) != _stored_dtype(right, theirs[spec.name]) for spec in both),
        )


@contextmanager
def _as_hf(store: HFStore | DistStore, config: AutoBridge | None) -> Iterator[Store]:
    """With a configuration, HF's names on either side, and weights instead of codes (see `codecs`)."""
    if config is None:
        yield store
    elif isinstance(store, DistStore):
        yield MappedCheckpoint.make(config, store.checkpoint)
    else:
        with hf_store(decode_checkpoint(store.checkpoint, model_dtype(config.hf_config))) as decoded:
            yield decoded


def _stored_dtype(store: Store, spec: TensorSpec) -> torch.dtype:
    return store.stored_dtype(spec.name) if isinstance(store, MappedCheckpoint) else spec.dtype


def _compare(left: Store, right: Store, ours: TensorSpec, theirs: TensorSpec) -> Iterator[Difference]:
    """At most one difference."""
    if ours.shape != theirs.shape:
        yield Difference(ours.name, f"shape {ours.shape} and {theirs.shape}")
        return
    count, first = 0, ""
    for region in split_region(ours):
        one, other = left.read(region), right.read(region)
        if one.dtype != other.dtype:
            wide = _wider(one.dtype, other.dtype)
            one, other = one.to(wide), other.to(wide)
        differ = _differ(one.contiguous(), other.contiguous())
        if differ.any():
            if not first:
                place = [int(index) for index in differ.nonzero()[0]]
                at = tuple(start + index for start, index in zip(region.offset, place, strict=True))
                values = f"{one[tuple(place)].item()} and {other[tuple(place)].item()}"
                first = f"first at {at}: {values} ({dtype_name(one.dtype)})"
            count += int(differ.sum())
    if count:
        yield Difference(ours.name, f"{count} of {ours.numel} elements, {first}")


def _wider(*dtypes: torch.dtype) -> torch.dtype:
    """A dtype that holds the values of both; torch promotes no FP8."""
    return torch.promote_types(
        *(torch.float32 if dtype.itemsize == 1 and dtype.is_floating_point else dtype for dtype in dtypes)
    )


def _differ(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where the bits of two tensors of a dtype and shape are not the same."""
    size = one.element_size()
    bits = [tensor.reshape(-1).view(torch.uint8).view(-1, size) for tensor in (one, other)]
    if torch.equal(*bits):
        return torch.zeros(one.shape, dtype=torch.bool)
    return (bits[0] != bits[1]).any(dim=1).view(one.shape)
