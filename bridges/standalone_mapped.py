"""A Megatron checkpoint as HF sees it: HF names, any box of them, nothing built.

The rules of the model's family are laid over the checkpoint's global tensors, in whichever of Megatron's two spellings
of layers they are stored: a key a layer, or one key with an axis of layers in front (Megatron-LM's default for layers
that are all alike).

    mapped = MappedCheckpoint.make(AutoBridge.from_hf_pretrained("path/to/hf"), DistCheckpoint.open(path))
    rows = mapped.read(Region("model.norm.weight", (0,), (2048,)))
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.models.prediction import count_megatron_layers
from weightcast.bridges.pieces import Piece, map_shard
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rule_table import RuleTable
from weightcast.bridges.rules import ModelDimensions, Tied
from weightcast.bridges.standalone_checkpoint import DistCheckpoint
from weightcast.sync.errors import UnmappedTensor
from weightcast.sync.regions import Region, TensorSpec

_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A rule's Megatron tensor in a checkpoint: under `key`, at index `layer` of its axis of layers if it has one."""

    key: str
    layer: int | None

    @property
    def lead(self) -> tuple[int, ...]:
        """The index in front of the rule's own dimensions."""
        return () if self.layer is None else (self.layer,)


@dataclass(frozen=True, slots=True)
class MappedCheckpoint:
    """HF tensors over a Megatron checkpoint. `specs` are in HF order, in HF's dtypes."""

    checkpoint: DistCheckpoint
    specs: tuple[TensorSpec, ...]
    pieces: Mapping[str, tuple[tuple[StoredTensor, Piece], ...]]
    """By HF name: what it is made of."""

    @staticmethod
    def make(bridge: AutoBridge, checkpoint: DistCheckpoint) -> "MappedCheckpoint":
        """Raises `UnmappedTensor` when the checkpoint is not of the bridge's model, by the first name."""
        bridge = bridge.with_prediction_layers(count_megatron_layers(checkpoint.specs))
        specs = bridge.hf_specs()
        table = table_of(bridge, specs)
        stored = {key: found for key in table.rules if (found := _find(key, checkpoint)) is not None}
        _check_keys(table, stored, checkpoint)
        pieces: dict[str, list[tuple[StoredTensor, Piece]]] = {spec.name: [] for spec in specs}
        for key, place in stored.items():
            if isinstance(table.rules[key], Tied):
                continue  # the tensor that it is an alias of is stored under its own key
            shape = checkpoint.specs[place.key].shape[len(place.lead) :]
            start = (0,) * len(shape)
            for piece in map_shard(table.segments(key, shape, start, shape), start, shape):
                pieces[piece.region.name].append((place, piece))
        for copy, original in table.copies.items():
            pieces[copy] = pieces[original]
        return MappedCheckpoint(checkpoint, specs, {name: tuple(parts) for name, parts in pieces.items()})

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the checkpoint stores the HF tensor `name`."""
        return self.checkpoint.specs[self.pieces[name][0][0].key].dtype

    def read(self, region: Region) -> torch.Tensor:
        """The values of an HF region, new, on the CPU, in the dtype in which they are stored."""
        result: torch.Tensor | None = None
        for place, piece in self.pieces[region.name]:
            if (overlap := piece.overlap(region)) is not None:
                wanted, local = overlap
                part = self._read_piece(place, piece, local)
                if result is None:
                    result = torch.empty(region.shape, dtype=part.dtype)
                result[wanted] = part
        assert result is not None, f"no rule gives {region}"
        return result

    def _read_piece(self, place: StoredTensor, piece: Piece, part_of_piece: Sequence[slice]) -> torch.Tensor:
        """A box of one piece, oriented as in HF, from the Megatron tensor."""
        local = list(part_of_piece)
        if piece.transposed:
            local[-2:] = reversed(local[-2:])
        offset: list[int] = list(place.lead)
        shape: list[int] = [1] * len(place.lead)
        dropped = len(place.lead) + sum(isinstance(part, int) for part in piece.index)
        for part in piece.index:
            if isinstance(part, slice):
                inner = local.pop(0)
                offset.append(part.start + inner.start)
                shape.append(inner.stop - inner.start)
            else:
                offset.append(part)
                shape.append(1)
        offset += [inner.start for inner in local]
        shape += [inner.stop - inner.start for inner in local]
        # Integers of an index come before its slices: an axis of layers, then one of experts.
        data = self.checkpoint.read(place.key, offset, shape).view(shape[dropped:])
        return data.mT if piece.transposed else data


def table_of(bridge: AutoBridge, specs: Sequence[TensorSpec]) -> RuleTable:
    """The rules of the bridge's model, checked against its HF tensors. Raises `UnmappedTensor`."""
    provider = bridge.to_megatron_provider(load_weights=False)
    return RuleTable.make(bridge.rules(specs), dimensions_of(provider), specs)


def dimensions_of(provider: GPTModelProvider) -> ModelDimensions:
    """What index maps need to know of the provider's model."""
    return ModelDimensions(
        num_layers=provider.num_layers,
        num_attention_heads=provider.num_attention_heads,
        num_query_groups=provider.num_query_groups,
        head_dim=provider.kv_channels,
        vocab_size=provider.vocab_size,
    )


def _find(key: str, checkpoint: DistCheckpoint) -> StoredTensor | None:
    if key in checkpoint.specs:
        return StoredTensor(key, None)
    match = _LAYER.search(key)
    if match is None:
        return None
    stacked = f"{key[: match.start()]}{match[1]}layers.{key[match.end() :]}"
    layer = int(match[2])
    if stacked in checkpoint.specs and layer < checkpoint.specs[stacked].shape[0]:
        return StoredTensor(stacked, layer)
    return None


def _check_keys(table: RuleTable, stored: Mapping[str, StoredTensor], checkpoint: DistCheckpoint) -> None:
    for key, rule in table.rules.items():
        if key not in stored and not isinstance(rule, Tied):
            raise UnmappedTensor(
                f"{checkpoint.folder} holds no {key}, which the configuration wants; "
                "take the configuration of the model that the checkpoint is of"
            )
    known = {place.key for place in stored.values()}
    for name in checkpoint.specs:
        if name not in known:
            raise UnmappedTensor(
                f"no rule maps {name} of {checkpoint.folder}; take the configuration of the model that the checkpoint "
                "is of"
            )
    for key in {place.key for place in stored.values() if place.layer is not None}:
        wanted = sum(place.key == key for place in stored.values())
        if (found := checkpoint.specs[key].shape[0]) != wanted:
            raise UnmappedTensor(
                f"{key} of {checkpoint.folder} has {found} layers, the configuration {wanted}; take the configuration "
                "of the model that the checkpoint is of"
            )
