"""Plans: which regions of which HF tensors this rank holds, and where in its parameters they lie.

A plan is a table of rules laid over a rank's shards. It is computed once, without communication, for the rank that
asks or (on meta tensors) for any rank of any layout; import, export and streaming only walk through it. Nothing is
left out in silence: a Megatron tensor without a rule, an HF tensor that nothing fills, a rule that matches nothing
and a shape that does not fit are each refused by name.

    plan = build_plan(model, LLAMA, hf_specs)
    for held in plan.regions:
        print(held.region, held.live().dtype)
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron.core.transformer.module import MegatronModule

from weightcast.bridges.pieces import Piece, join_lanes, map_shard
from weightcast.bridges.rule_table import RuleTable, name_some
from weightcast.bridges.rules import ModelDimensions, Rule, Segment, Tied, Vocab
from weightcast.bridges.shards import (
    InterleavedView,
    LiveView,
    Model,
    ParameterView,
    Shard,
    is_adapter_key,
    read_shards,
    unwrap_chunks,
)
from weightcast.sync.errors import UnmappedTensor
from weightcast.sync.regions import HeldRegion, TensorSpec

# With what is in front of the number: `mtp.layers.0` and `decoder.layers.0` are different layers.
_LAYER = re.compile(r"(?:.*?\.)?layers\.\d+(?=\.)")
# Keys that live on the first pipeline stage; keys without a layer number are otherwise on the last one.
_FIRST_STAGE_PREFIXES = ("embedding.", "language_model.embedding.", "visual.")
# With layers for multi-token prediction, the final norm is on the stage of the last layer, which may be one before.
_DECODER_PREFIX = "decoder."


@dataclass(frozen=True, slots=True)
class PlannedRegion(HeldRegion):
    """A region that this rank holds; `held.live()` has its values, `held.live.write(data)` sets them."""

    live: LiveView


@dataclass(frozen=True, slots=True)
class WeightConversionTask:
    """One Megatron tensor of the whole model, the rule that maps it, and the part of it that this rank holds.

    The list of tasks is the same on every rank, in Megatron's order; `held` is empty where the tensor lives elsewhere.
    """

    global_param_name: str
    rule: Rule
    hf_names: tuple[str, ...]
    held: tuple[PlannedRegion, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every byte that this rank holds lies in the HF model."""

    specs: tuple[TensorSpec, ...]
    """Every HF tensor of the whole model, in HF order; the same on every rank."""
    tasks: tuple[WeightConversionTask, ...]
    regions: tuple[PlannedRegion, ...]
    """What this rank holds, replicas included, in HF order."""
    copies: Mapping[str, str]
    """HF tensors that the checkpoint stores a second time because two names are tied: copy → original."""
    padding: tuple[ParameterView, ...]
    """Rows that exist in Megatron alone (the padded vocabulary)."""

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's regions in the dtypes of the HF tensors."""
        dtypes = {spec.name: spec.dtype for spec in self.specs}
        return sum(held.region.numel * dtypes[held.region.name].itemsize for held in self.regions)


@dataclass(frozen=True, slots=True)
class Stages:
    """Which ends of the pipeline this rank's chunks reach; what is not here cannot be asked to match."""

    first: bool
    last: bool


def build_plan(model: Model, rules: Iterable[Rule], hf_specs: Sequence[TensorSpec]) -> Plan:
    """The plan of this rank for `model`, its list of Megatron chunks (wrapped by DDP or not).

    `hf_specs` are all tensors of the HF model; adapters are no part of it (`weightcast.bridges.peft` plans them).
    Issues no collective; every rank may call it alone. Raises `UnmappedTensor`.
    """
    chunks = unwrap_chunks(model)
    rules = tuple(rules)
    dimensions = read_dimensions(chunks[0], rules, hf_specs)
    shards = [shard for shard in read_shards(chunks) if not is_adapter_key(shard.key)]
    return lay_rules(shards, read_stages(chunks), dimensions, rules, hf_specs)


def read_stages(chunks: Sequence[MegatronModule]) -> Stages:
    """Which ends of the pipeline the bare `chunks` of this rank reach."""
    return Stages(
        first=any(getattr(chunk, "pre_process", False) for chunk in chunks),
        last=any(getattr(chunk, "post_process", False) for chunk in chunks),
    )


def lay_rules(
    shards: Sequence[Shard],
    stages: Stages,
    dimensions: ModelDimensions,
    rules: Sequence[Rule],
    hf_specs: Sequence[TensorSpec],
) -> Plan:
    """`build_plan` without a model: a pure function of its arguments."""
    return lay_table(RuleTable.make(rules, dimensions, hf_specs), shards, stages)


def lay_table(table: RuleTable, shards: Sequence[Shard], stages: Stages) -> Plan:
    """The plan of one rank; for many ranks of one model the table is made once. Raises `UnmappedTensor`."""
    _check_matches(table.rules, stages, {shard.key for shard in shards})
    pieces: dict[str, list[tuple[Piece, ParameterView]]] = {key: [] for key in table.rules}
    padding: list[ParameterView] = []
    for shard in shards:
        segments = table.segments(shard.key, shard.global_shape, shard.offset, shard.view.shape)
        pieces[shard.key] += [(piece, shard.view) for piece in map_shard(segments, shard.offset, shard.view.shape)]
        padding += _find_padding(shard, segments)

    tasks = tuple(
        WeightConversionTask(key, rule, table.hf_names[key], _hold(pieces[key], table.copies))
        for key, rule in table.rules.items()
    )
    regions = sorted(
        (region for task in tasks for region in task.held),
        key=lambda item: (table.order[item.region.name], item.region.offset),
    )
    return Plan(tuple(table.specs.values()), tasks, tuple(regions), table.copies, tuple(padding))


def read_dimensions(chunk: MegatronModule, rules: Iterable[Rule], hf_specs: Sequence[TensorSpec]) -> ModelDimensions:
    """The numbers that index maps need, from a bare chunk's configuration and the base model's HF tensors."""
    config = chunk.config
    vocab_names = {name for rule in rules if isinstance(rule, Vocab) for name in rule.hf_names}
    vocab_sizes = {spec.shape[0] for spec in hf_specs if spec.name in vocab_names}
    if len(vocab_sizes) > 1:
        raise UnmappedTensor(
            f"{', '.join(sorted(vocab_names))} have {sorted(vocab_sizes)} rows in the HF model; "
            "they must share one vocabulary"
        )
    return ModelDimensions(
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=vocab_sizes.pop() if vocab_sizes else 0,
    )


def _check_matches(table: Mapping[str, Rule], stages: Stages, keys: set[str]) -> None:
    """Every local key has a rule, and every rule of a part of the model that is here has its key."""
    if unmapped := sorted(keys - table.keys()):
        raise UnmappedTensor(
            f"no rule maps the Megatron tensor {name_some(unmapped)}; add a rule for it to the model's table, "
            "or switch off the feature of the configuration that adds it"
        )
    layers = {layer for key in keys if (layer := _layer_of(key)) is not None}
    for key, rule in table.items():
        if key not in keys and not isinstance(rule, Tied) and _belongs_here(key, stages, layers):
            raise UnmappedTensor(
                f"the rule {type(rule).__name__} of {key} matches nothing: the model has no such tensor, "
                f"so {name_some(rule.hf_names)} would never be filled"
            )


def _belongs_here(key: str, stages: Stages, layers: set[str]) -> bool:
    layer = _layer_of(key)
    if layer is not None:
        return layer in layers
    if key.startswith(_DECODER_PREFIX) and not any(layer.startswith(_DECODER_PREFIX) for layer in layers):
        return False
    return stages.first if key.startswith(_FIRST_STAGE_PREFIXES) else stages.last


def _layer_of(key: str) -> str | None:
    match = _LAYER.match(key)
    return match[0] if match else None


def _hold(pieces: Sequence[tuple[Piece, ParameterView]], copies: Mapping[str, str]) -> tuple[PlannedRegion, ...]:
    held = [PlannedRegion(region, _view(parts)) for region, parts in join_lanes(pieces)]
    for copy, original in copies.items():
        held += [
            PlannedRegion(replace(item.region, name=copy), item.live) for item in held if item.region.name == original
        ]
    return tuple(held)


def _view(parts: Sequence[tuple[Piece, ParameterView]]) -> LiveView:
    views = [view.at(piece.index) for piece, view in parts]
    lane = parts[0][0].lane
    if parts[0][0].transposed:
        views = [view.transposed() for view in views]
    return views[0] if lane is None else InterleavedView(tuple(views), lane.axis)


def _find_padding(shard: Shard, segments: Sequence[Segment]) -> list[ParameterView]:
    """The shard's rows past the last segment. Rules leave no holes between segments, and never pad experts."""
    if segments[0].expert is not None:
        return []
    num_rows = shard.view.shape[0]
    mapped = max(segment.megatron_row + segment.num_rows for segment in segments) - shard.offset[0]
    start = min(max(mapped, 0), num_rows)
    return [shard.view.at((slice(start, num_rows),))] if start < num_rows else []
