"""RuleTable: a model's rules at every layer, checked against its HF tensors.

It is what the plans of all ranks of one model have in common: made once, it serves any number of ranks, and keeps the
segments of each tensor by expert so that a rank looks only at its own.

    table = RuleTable.make(LLAMA, dimensions, hf_specs)
    plans = [lay_table(table, shards_of(rank), stages_of(rank)) for rank in range(1024)]
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightcast.bridges.rules import ModelDimensions, Rule, Segment, Tied, expand_rules, hf_shapes
from weightcast.sync.errors import UnmappedTensor
from weightcast.sync.regions import TensorSpec, check_unique_names


@dataclass(frozen=True, slots=True)
class RuleTable:
    """Rules by global Megatron key, and the HF tensors that they fill between them."""

    rules: Mapping[str, Rule]
    """By global Megatron key."""
    dimensions: ModelDimensions
    specs: Mapping[str, TensorSpec]
    order: Mapping[str, int]
    copies: Mapping[str, str]
    hf_names: Mapping[str, tuple[str, ...]]
    """The HF tensors of each key, copies included."""
    _segments: dict[tuple[str, tuple[int, ...]], dict[int | None, tuple[Segment, ...]]]

    @staticmethod
    def make(rules: Iterable[Rule], dimensions: ModelDimensions, hf_specs: Sequence[TensorSpec]) -> "RuleTable":
        """Expand `rules` and check that they fill every HF tensor once. Raises `UnmappedTensor`."""
        check_unique_names(hf_specs)
        specs = {spec.name: spec for spec in hf_specs}
        table = expand_rules(rules, dimensions.num_layers)
        names = {key: rule.hf_names for key, rule in table.items()}
        copies = _find_copies(table.values(), specs)
        _check_hf_names(table, names, specs, copies)
        with_copies = {key: _with_copies(own, copies) for key, own in names.items()}
        order = {name: index for index, name in enumerate(specs)}
        return RuleTable(table, dimensions, specs, order, copies, with_copies, {})

    def segments(
        self, key: str, global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[Segment, ...]:
        """The segments that the box `offset`, `shape` of a Megatron tensor can meet: those of its experts, or all.

        Raises `UnmappedTensor` when the tensor's shape does not fit the rule or the HF tensors.
        """
        place = (key, global_shape)
        if place not in self._segments:
            self._segments[place] = self._find_segments(*place)
        by_expert = self._segments[place]
        if None in by_expert:
            return by_expert[None]
        experts = range(offset[0], offset[0] + shape[0])
        return tuple(segment for expert in experts for segment in by_expert[expert])

    def _find_segments(self, key: str, shape: tuple[int, ...]) -> dict[int | None, tuple[Segment, ...]]:
        rule = self.rules[key]
        segments = rule.segments(shape, self.dimensions)
        _check_shapes(rule, segments, shape, self.specs)
        by_expert: dict[int | None, list[Segment]] = {}
        for segment in segments:
            by_expert.setdefault(segment.expert, []).append(segment)
        return {expert: tuple(part) for expert, part in by_expert.items()}


def _find_copies(rules: Iterable[Rule], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    tied = [rule for rule in rules if isinstance(rule, Tied)]
    return {rule.copy: rule.hf for rule in tied if rule.copy is not None and rule.copy in specs}


def _with_copies(names: tuple[str, ...], copies: Mapping[str, str]) -> tuple[str, ...]:
    if not copies:
        return names
    return names + tuple(copy for copy, original in copies.items() if original in names)


def _check_hf_names(
    rules: Mapping[str, Rule],
    names: Mapping[str, tuple[str, ...]],
    specs: Mapping[str, TensorSpec],
    copies: Mapping[str, str],
) -> None:
    """Every HF tensor is filled by one rule, and every rule's HF tensors exist. Sees the whole model on any rank."""
    filled: dict[str, str] = {}
    for key, rule in rules.items():
        if isinstance(rule, Tied):
            continue
        for name in names[key]:
            if name in filled:
                raise UnmappedTensor(f"the HF tensor {name} is filled twice, from {filled[name]} and {key}")
            filled[name] = key
    if unfilled := [name for name in specs if name not in filled and name not in copies]:
        raise UnmappedTensor(
            f"no rule fills the HF tensor {name_some(unfilled)}; add a rule for it to the model's table"
        )
    if absent := [name for name in filled if name not in specs]:
        raise UnmappedTensor(
            f"the rule of {filled[absent[0]]} wants the HF tensor {name_some(absent)}, which the HF model lacks; "
            "the table must leave out what the configuration switches off (biases, an untied output layer)"
        )


def _check_shapes(
    rule: Rule, segments: Sequence[Segment], shape: tuple[int, ...], specs: Mapping[str, TensorSpec]
) -> None:
    for name, want in hf_shapes(segments, shape).items():
        if specs[name].shape != want:
            raise UnmappedTensor(
                f"{name} has shape {specs[name].shape} in the HF model, but {rule.megatron} of shape {shape} makes "
                f"{want} by the rule {type(rule).__name__}; the model was built for another configuration"
            )


def name_some(names: Sequence[str]) -> str:
    """The first of `names` and how many more there are, for a message."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}"
