"""Rules: where the rows of a global Megatron tensor lie among the tensors of an HF checkpoint.

A family of models is one table of rules. A rule is an index map and nothing else: it gives, for the global
shape of its Megatron tensor and the model's dimensions, a short list of `Segment`s ("these rows are those rows
of that HF tensor"). Import and export read the same list in opposite directions, and a shard of any layout is a
box that `pieces.map_shard` cuts out of it, so no rule ever hears of tensor or pipeline parallelism.

    LLAMA = (
        Vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        FusedQkv(
            "decoder.layers.{layer}.self_attention.linear_qkv.weight",
            q="model.layers.{layer}.self_attn.q_proj.weight",
            k="model.layers.{layer}.self_attn.k_proj.weight",
            v="model.layers.{layer}.self_attn.v_proj.weight",
        ),
    )
    rule = expand_rules(LLAMA, num_layers=2)["decoder.layers.1.self_attention.linear_qkv.weight"]
    segments = rule.segments((6144, 4096), dimensions)

`rules_experts` lifts such rules over an axis of experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

from weightcast.sync.errors import UnmappedTensor

LAYER = "{layer}"


@dataclass(frozen=True, slots=True)
class ModelDimensions:
    """The few numbers of a model that index maps need; all are of the whole model, never of a shard."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the HF embedding, before Megatron's padding."""


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_rows` rows of a Megatron tensor from `megatron_row` are those of the HF tensor `hf` from `hf_row`.

    A row is an index of the first dimension, or of the second in a tensor with an axis of experts in front; the
    dimensions behind it are the same on both sides.
    """

    hf: str
    megatron_row: int
    hf_row: int
    num_rows: int
    expert: int | None = None
    """The index on Megatron's axis of experts, where there is one."""
    stacked: bool = False
    """The HF tensor has the axis of experts as well."""
    hf_step: int = 1
    """HF rows lie this far apart; those between belong to other segments of the same step."""
    transposed: bool = False
    """HF holds the matrix transposed: rows are its last dimension, columns the one before."""


class Rule(Protocol):
    """What the planner needs of a rule. Frozen dataclasses of text templates; `{layer}` stands for a layer number."""

    @property
    def megatron(self) -> str:
        """Global key of the Megatron tensor, in the spelling of `sharded_state_dict`."""
        ...

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The HF tensors that this rule fills."""
        ...

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        """The index map for the global Megatron `shape`. Raises `UnmappedTensor` when the shape does not fit."""
        ...

    def at_layer(self, layer: int) -> Self:
        """The same rule with `{layer}` filled in."""
        ...


@dataclass(frozen=True, slots=True)
class TemplateRule:
    """A rule whose fields are all names, or templates of names."""

    megatron: str

    def at_layer(self, layer: int) -> Self:
        texts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: text.replace(LAYER, str(layer)) for name, text in texts.items() if isinstance(text, str)}
        )


@dataclass(frozen=True, slots=True)
class Rename(TemplateRule):
    """The same tensor under two names."""

    hf: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        return (Segment(self.hf, 0, 0, shape[0]),)


@dataclass(frozen=True, slots=True)
class Vocab(TemplateRule):
    """One row a token. Megatron pads the rows for its parallel layout; HF stores `vocab_size` of them."""

    hf: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        if shape[0] < dimensions.vocab_size:
            raise UnmappedTensor(
                f"{self.megatron} has {shape[0]} rows, fewer than the {dimensions.vocab_size} tokens of {self.hf}; "
                "build the model with a padded vocabulary of at least that size"
            )
        return (Segment(self.hf, 0, 0, dimensions.vocab_size),)


@dataclass(frozen=True, slots=True)
class FusedQkv(TemplateRule):
    """Query, key and value projections in one tensor (weight or bias), interleaved by query group.

    Megatron's rows of one group are its query heads, then its key head, then its value head; `head_dim` rows each
    (megatron/core/transformer/attention.py, `get_query_key_value_tensors`).
    """

    q: str
    k: str
    v: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        head_dim, num_groups = dimensions.head_dim, dimensions.num_query_groups
        if dimensions.num_attention_heads % num_groups:
            raise UnmappedTensor(
                f"{self.megatron}: {dimensions.num_attention_heads} attention heads do not divide into "
                f"{num_groups} query groups"
            )
        query_rows = dimensions.num_attention_heads // num_groups * head_dim
        group_rows = query_rows + 2 * head_dim
        if shape[0] != group_rows * num_groups:
            raise UnmappedTensor(
                f"{self.megatron} has {shape[0]} rows; {num_groups} query groups of {query_rows} query, {head_dim} key "
                f"and {head_dim} value rows make {group_rows * num_groups}. An attention output gate wants its own rule"
            )
        result: list[Segment] = []
        for group in range(num_groups):
            start = group * group_rows
            result += (
                Segment(self.q, start, group * query_rows, query_rows),
                Segment(self.k, start + query_rows, group * head_dim, head_dim),
                Segment(self.v, start + query_rows + head_dim, group * head_dim, head_dim),
            )
        return tuple(result)


@dataclass(frozen=True, slots=True)
class GatedMlp(TemplateRule):
    """The gate and up projections of a gated MLP in one tensor (weight or bias): all gate rows, then all up rows."""

    gate: str
    up: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        half, odd = divmod(shape[0], 2)
        if odd:
            raise UnmappedTensor(f"{self.megatron} has {shape[0]} rows; gate and up rows must be equally many")
        return (Segment(self.gate, 0, 0, half), Segment(self.up, half, 0, half))


@dataclass(frozen=True, slots=True)
class Tied(TemplateRule):
    """A Megatron tensor that is an alias of the HF tensor `hf`, which another rule fills; padded like `Vocab`.

    Megatron itself lists the tied output layer of a last pipeline stage under the embedding's key
    (`LanguageModule.tie_embeddings_and_output_weights_state_dict`), so this rule may match nothing. `copy` names
    the second copy that some HF checkpoints store all the same; where one does, it is read, compared and exported.
    """

    hf: str
    copy: str | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        return Vocab(self.megatron, self.hf).segments(shape, dimensions)


def expand_rules(rules: Iterable[Rule], num_layers: int) -> dict[str, Rule]:
    """Every rule at every layer, by global Megatron key. Raises `UnmappedTensor` when two rules claim one key."""
    table: dict[str, Rule] = {}
    for rule in rules:
        layers = range(num_layers) if LAYER in rule.megatron else range(1)
        for layer in layers:
            concrete = rule.at_layer(layer)
            if concrete.megatron in table:
                raise UnmappedTensor(f"two rules claim the Megatron tensor {concrete.megatron}; remove one")
            table[concrete.megatron] = concrete
    return table


def hf_shapes(segments: Sequence[Segment], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Full shapes of the HF tensors that `segments` of a Megatron tensor of global `shape` make up."""
    rows: dict[str, int] = {}
    kinds: dict[str, Segment] = {}
    for segment in segments:
        rows[segment.hf] = rows.get(segment.hf, 0) + segment.num_rows
        kinds[segment.hf] = segment
    return {name: _hf_shape(kinds[name], num_rows, shape) for name, num_rows in rows.items()}


def _hf_shape(kind: Segment, num_rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an HF tensor to which segments like `kind` give `num_rows` in all."""
    if kind.expert is None:
        return _turn((num_rows, *shape[1:]), kind.transposed)
    if kind.stacked:
        return (shape[0], *_turn((num_rows // shape[0], *shape[2:]), kind.transposed))
    return _turn((num_rows, *shape[2:]), kind.transposed)


def _turn(box: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return box[::-1] if transposed else box
