"""Rules of experts: a rule for one expert, lifted over the axis of experts of a Megatron tensor.

`sharded_state_dict` lists all experts of a layer under one key, of global shape [experts, rows, columns], alike for
`SequentialMLP` and for Transformer Engine's grouped linears. HF checkpoints store one tensor for each expert, or stack
them, some transposed or with the rows of gate and up alternating. Each of these is a small rule around another.

    PerExpert(
        Rename(
            "decoder.layers.{layer}.mlp.experts.experts.linear_fc2.weight",
            "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        ),
        num_experts=128,
    )
    StackedExperts(Transposed(Rename("...experts.experts.linear_fc2.weight", "...mlp.experts.down_proj")), 32)
"""

from dataclasses import dataclass, replace
from typing import Self

from weightcast.bridges.rules import GatedMlp, ModelDimensions, Rule, Segment, TemplateRule
from weightcast.sync.errors import UnmappedTensor

EXPERT = "{expert}"


@dataclass(frozen=True, slots=True)
class _WrappedRule:
    """A rule around `rule`, of the same Megatron tensor."""

    rule: Rule

    @property
    def megatron(self) -> str:
        return self.rule.megatron

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.rule.hf_names

    def at_layer(self, layer: int) -> Self:
        return replace(self, rule=self.rule.at_layer(layer))


@dataclass(frozen=True, slots=True)
class PerExpert(_WrappedRule):
    """HF stores each expert in tensors of its own: `{expert}` in the names of `rule` stands for its number."""

    num_experts: int

    @property
    def hf_names(self) -> tuple[str, ...]:
        names = self.rule.hf_names
        return tuple(name.replace(EXPERT, str(expert)) for expert in range(self.num_experts) for name in names)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        return tuple(
            replace(segment, hf=segment.hf.replace(EXPERT, str(expert)), expert=expert)
            for expert in range(self.num_experts)
            for segment in _segments_of_one(self, self.num_experts, shape, dimensions)
        )


@dataclass(frozen=True, slots=True)
class StackedExperts(_WrappedRule):
    """HF stacks the experts: its tensors have the axis of experts in front of what `rule` makes of one."""

    num_experts: int

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        return tuple(
            replace(segment, expert=expert, stacked=True)
            for expert in range(self.num_experts)
            for segment in _segments_of_one(self, self.num_experts, shape, dimensions)
        )


@dataclass(frozen=True, slots=True)
class Transposed(_WrappedRule):
    """HF holds each matrix that `rule` makes transposed, as [columns, rows]."""

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        if len(shape) != 2:
            raise UnmappedTensor(
                f"{self.megatron} has {len(shape)} dimensions where Transposed looks; it transposes matrices, and goes "
                "inside StackedExperts or PerExpert where the tensor has an axis of experts"
            )
        return tuple(replace(segment, transposed=True) for segment in self.rule.segments(shape, dimensions))


@dataclass(frozen=True, slots=True)
class InterleavedGatedMlp(TemplateRule):
    """The gate and up projections of a gated MLP in one HF tensor with alternating rows: gate 0, up 0, gate 1, ...

    Gate and up are lanes of the tensor (`pieces`): ranks hold equal rows of both, which HF has next to each other.
    """

    gate_up: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate_up,)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        gate, up = GatedMlp(self.megatron, self.gate_up, self.gate_up).segments(shape, dimensions)
        return (replace(gate, hf_step=2), replace(up, hf_row=1, hf_step=2))


def _segments_of_one(
    rule: _WrappedRule, num_experts: int, shape: tuple[int, ...], dimensions: ModelDimensions
) -> tuple[Segment, ...]:
    """What the inner rule makes of one expert's tensor."""
    if len(shape) < 2 or shape[0] != num_experts:
        raise UnmappedTensor(
            f"{rule.megatron} has shape {shape}, but the rule {type(rule).__name__} maps {num_experts} experts along "
            "the first dimension; the model was built for another number of experts"
        )
    return rule.rule.segments(shape[1:], dimensions)
