"""Shards: what Megatron-Core says of the parameters that this rank holds, in our own words.

`sharded_state_dict` knows the global key, shape and offset of every local shard under every kind of parallelism and
for Transformer Engine and local layers alike. Here its entries become `Shard` records whose memory is a
`ParameterView`: a place inside a parameter object, turned into a tensor only at the moment of use. HF rows that lie in
two places of a parameter in turns are an `InterleavedView`.

    for shard in read_shards(unwrap_chunks(model)):
        print(shard.key, shard.global_shape, shard.offset, shard.view().shape)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from weightcast.sync.errors import UnmappedTensor

Model: TypeAlias = Sequence[MegatronModule] | MegatronModule
"""What providers give and everything here takes: a rank's chunks, wrapped or not, or the only one."""

# One global key a layer, with the layer's number in it, instead of one key with a layer axis.
SHARDING_METADATA = {"non_homogeneous_layers": True}
# Transformer Engine's FP8 bookkeeping (scales and amax histories). Weights never live there, and HF has no such thing.
EXTRA_STATE_SUFFIX = "_extra_state"
# In the keys of tensors that an adapter adds beside a linear (`weightcast.bridges.peft`).
_ADAPTER = ".adapter."


class LiveView(Protocol):
    """The memory behind a region of an HF tensor."""

    def __call__(self) -> torch.Tensor:
        """The present values: a view of the parameter, or a new tensor where its memory is laid out in another way."""
        ...

    def write(self, data: torch.Tensor) -> None:
        """Copy `data`, of the region's shape, into the parameter; cast to its dtype."""
        ...


@dataclass(frozen=True, slots=True)
class ParameterView:
    """A box of a parameter. Calling it gives a tensor over the parameter's memory as it is at that moment.

    DDP and the distributed optimizer re-point `parameter.data` into buffers of their own, so no tensor is kept.
    """

    parameter: torch.Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements, from the parameter's first."""

    def __call__(self) -> torch.Tensor:
        data = self.parameter.detach()
        assert data.is_contiguous(), "a parameter was re-pointed at memory that is not contiguous"
        return data.as_strided(self.shape, self.stride, data.storage_offset() + self.offset)

    def write(self, data: torch.Tensor) -> None:
        """Copy `data` into the parameter."""
        self().copy_(data)

    def at(self, index: tuple[int | slice, ...]) -> "ParameterView":
        """What `tensor[index]` is of a tensor: an integer drops its dimension, a slice (with both ends) keeps it."""
        shape, stride, offset = list(self.shape[len(index) :]), list(self.stride[len(index) :]), self.offset
        for axis, part in reversed(list(enumerate(index))):
            offset += self.stride[axis] * (part.start if isinstance(part, slice) else part)
            if isinstance(part, slice):
                shape.insert(0, part.stop - part.start)
                stride.insert(0, self.stride[axis])
        return replace(self, shape=tuple(shape), stride=tuple(stride), offset=offset)

    def transposed(self) -> "ParameterView":
        """The view with its last two dimensions swapped."""
        swap = (*range(len(self.shape) - 2), len(self.shape) - 1, len(self.shape) - 2)
        return replace(
            self, shape=tuple(self.shape[axis] for axis in swap), stride=tuple(self.stride[axis] for axis in swap)
        )


@dataclass(frozen=True, slots=True)
class InterleavedView:
    """Views of one shape in turns along dimension `axis`: index 0 of each of them, then index 1 of each."""

    lanes: tuple[LiveView, ...]
    axis: int

    def __call__(self) -> torch.Tensor:
        """A new tensor; no strides say what this order is."""
        return torch.stack([lane() for lane in self.lanes], dim=self.axis + 1).flatten(self.axis, self.axis + 1)

    def write(self, data: torch.Tensor) -> None:
        """Copy every lane of `data` into its own place."""
        parts = torch.unflatten(data, self.axis, (-1, len(self.lanes))).unbind(self.axis + 1)
        for lane, part in zip(self.lanes, parts, strict=True):
            lane.write(part)


@dataclass(frozen=True, slots=True)
class Shard:
    """A local box of a global Megatron tensor. `offset` and `view.shape` are in the global tensor's coordinates."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    view: ParameterView


def is_adapter_key(key: str) -> bool:
    """Whether a Megatron tensor, by its global key or its name in a state dict, belongs to an adapter."""
    return _ADAPTER in key


def unwrap_chunks(model: Model) -> list[MegatronModule]:
    """The bare model chunks (one a virtual pipeline stage) inside DDP and half-precision wrappers."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    return list(unwrap_model(chunks))


def read_shards(chunks: Sequence[MegatronModule]) -> tuple[Shard, ...]:
    """Every shard of a weight that this rank holds, replicas included. Issues no collective.

    Works on the meta device too. Raises `UnmappedTensor` for an entry of `sharded_state_dict` that is neither a
    tensor of the model's nor Transformer Engine's extra state.
    """
    return tuple(shard for chunk in chunks for shard in _read_chunk(chunk))


def _read_chunk(chunk: MegatronModule) -> Iterator[Shard]:
    state = chunk.sharded_state_dict(metadata=dict(SHARDING_METADATA))
    apply_factories(state)
    finder = _ParameterFinder(chunk)
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            yield _read_tensor(entry, finder)
        elif not (isinstance(entry, ShardedObject) and entry.key.endswith(EXTRA_STATE_SUFFIX)):
            name = getattr(entry, "key", type(entry).__name__)
            raise UnmappedTensor(
                f"the model's sharded_state_dict holds {name}, a {type(entry).__name__}; a bridge maps tensors, "
                f"and knows besides only entries that end in {EXTRA_STATE_SUFFIX}"
            )


def _read_tensor(entry: ShardedTensor, finder: "_ParameterFinder") -> Shard:
    view = finder.find(entry.key, entry.data)
    # The axes in front of the parameter's own: a parameter is one expert's, an entry of the global axis of experts.
    in_front = (1,) * entry.prepend_axis_num
    view = replace(view, shape=(*in_front, *view.shape), stride=(*in_front, *view.stride))
    return Shard(entry.key, tuple(entry.global_shape), tuple(entry.global_offset), view)


class _ParameterFinder:
    """Finds the parameter or buffer whose memory a tensor is a view of.

    By storage object, not by address: meta tensors have no addresses. After DDP many parameters share a storage,
    so the place inside it decides.
    """

    def __init__(self, chunk: MegatronModule) -> None:
        self._owners: dict[int, list[torch.Tensor]] = {}
        for owner in (*chunk.parameters(), *chunk.buffers()):
            self._owners.setdefault(owner.untyped_storage()._cdata, []).append(owner)

    def find(self, key: str, tensor: torch.Tensor) -> ParameterView:
        for owner in self._owners.get(tensor.untyped_storage()._cdata, ()):
            offset = int(tensor.storage_offset()) - int(owner.storage_offset())
            if 0 <= offset < owner.numel() and owner.is_contiguous():
                return ParameterView(owner, tuple(tensor.shape), tuple(tensor.stride()), offset)
        raise UnmappedTensor(
            f"{key}: Megatron lists a tensor that is not a view of a contiguous parameter or buffer of the model, "
            "so reading it later would give stale weights"
        )
