"""Rules of adapters, derived from those of the weights that they adapt. Pure.

The rows of B, and of DoRA's magnitudes, are the rows of the weight: whatever the weight's rule says of them holds for
them too, so that a fused `linear_qkv` gives B's of query, key and value, and PEFT's A of each is the one A there is.
A part of a fused linear with a pair of its own (`adapter_q`) is that part's HF tensor and nothing else.

    rules = adapter_rules(bridge.family.rules(hf_config), num_layers, LoRA(dim=16))
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from weightcast.bridges.peft.names import (
    LINEAR_IN,
    LINEAR_OUT,
    LORA_A,
    LORA_B,
    LORA_MAGNITUDE,
    MAGNITUDE,
    linear_of_key,
    peft_name,
)
from weightcast.bridges.peft.recipes import LoRA
from weightcast.bridges.peft.settings import UpdateSettings
from weightcast.bridges.rules import FusedQkv, GatedMlp, ModelDimensions, Rename, Rule, Segment, expand_rules
from weightcast.bridges.rules_experts import EXPERT, PerExpert
from weightcast.sync.errors import UnmappedTensor
from weightcast.sync.regions import TensorSpec

PART_FIELDS = {
    "adapter_q": (FusedQkv, "q"),
    "adapter_k": (FusedQkv, "k"),
    "adapter_v": (FusedQkv, "v"),
    "adapter_gate": (GatedMlp, "gate"),
    "adapter_up": (GatedMlp, "up"),
}


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """B or DoRA's magnitudes: `tensor` of PEFT, with the rows of the weight that `rule` maps."""

    megatron: str
    rule: Rule
    tensor: str
    rank: int
    """Of the update."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(peft_name(name, self.tensor) for name in self.rule.hf_names)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        segments = self.rule.segments(shape, dimensions)
        return tuple(replace(segment, hf=peft_name(segment.hf, self.tensor)) for segment in segments)

    def at_layer(self, layer: int) -> Self:
        return self


@dataclass(frozen=True, slots=True)
class AdapterInputs:
    """A: whole, and one for all HF tensors that the weight's `rule` fills."""

    megatron: str
    rule: Rule
    rank: int

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(peft_name(name, LORA_A) for name in self.rule.hf_names)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        if not isinstance(self.rule, PerExpert):
            return tuple(Segment(name, 0, 0, shape[0]) for name in self.hf_names)
        if len(shape) != 3 or shape[0] != self.rule.num_experts:
            raise UnmappedTensor(f"{self.megatron} has shape {shape}, not one of {self.rule.num_experts} experts")
        templates = [peft_name(name, LORA_A) for name in self.rule.rule.hf_names]
        return tuple(
            Segment(name.replace(EXPERT, str(expert)), 0, 0, shape[1], expert=expert)
            for expert in range(self.rule.num_experts)
            for name in templates
        )

    def at_layer(self, layer: int) -> Self:
        return self


@dataclass(frozen=True, slots=True)
class AdaptedPart:
    """A weight that is adapted, or a part of a fused one that is adapted by itself."""

    prefix: str
    """Of the global keys of its factors."""
    rule: Rule
    settings: UpdateSettings


def adapted_parts(rules: Iterable[Rule], num_layers: int, recipe: LoRA) -> Iterator[AdaptedPart]:
    """Every weight that `recipe` adapts in the whole model, or part of one that is adapted by itself."""
    for key, rule in expand_rules(rules, num_layers).items():
        linear = linear_of_key(key)
        parts = recipe.parts_of(linear) if linear is not None else None
        if linear is not None and parts is not None:
            for part in parts or ("",):
                own = part_rule(rule, part) if part else rule
                prefix = f"{key.removesuffix('weight')}adapter.{part and f'{part}.'}"
                yield AdaptedPart(prefix, own, recipe.settings_of(linear, part))


def weight_settings(rules: Iterable[Rule], num_layers: int, recipe: LoRA) -> dict[str, UpdateSettings]:
    """The settings of each weight that `recipe` adapts, by HF's names."""
    parts = adapted_parts(rules, num_layers, recipe)
    return {name: part.settings for part in parts for name in part.rule.hf_names}


def adapter_rules(rules: Iterable[Rule], num_layers: int, recipe: LoRA) -> tuple[Rule, ...]:
    """The rules of all adapters of the model. Raises `UnmappedTensor` for what PEFT has no names for."""
    result: list[Rule] = []
    for part in adapted_parts(rules, num_layers, recipe):
        _check_expressible(part.rule)
        rank = part.settings.rank
        result.append(AdapterInputs(f"{part.prefix}{LINEAR_IN}", part.rule, rank))
        result.append(AdapterRows(f"{part.prefix}{LINEAR_OUT}", part.rule, LORA_B, rank))
        if recipe.use_dora:
            result.append(AdapterRows(f"{part.prefix}{MAGNITUDE}", part.rule, LORA_MAGNITUDE, rank))
    return tuple(result)


def part_rule(rule: Rule, part: str) -> Rule:
    """The rule of one part of a fused weight. Raises `UnmappedTensor` where HF has the fused weight in one tensor."""
    if isinstance(rule, PerExpert):
        return replace(rule, rule=part_rule(rule.rule, part))
    kind, field = PART_FIELDS[part]
    if not isinstance(rule, kind):
        raise UnmappedTensor(
            f"{rule.megatron} is {', '.join(rule.hf_names[:3])} in the HF model, where its part {part} has no A of its "
            "own; target the fused linear as a whole, with LoRA or DoRA"
        )
    return Rename(rule.megatron, getattr(rule, field))


def _check_expressible(rule: Rule) -> None:
    """PEFT adapts matrices that are modules: not stacks of experts, nor anything stored transposed."""
    inner = rule.rule if isinstance(rule, PerExpert) else rule
    if hasattr(inner, "rule"):
        raise UnmappedTensor(
            f"{rule.megatron} is {rule.hf_names[0]} in the HF model, which stacks or transposes experts and has no "
            "LoRA of each in PEFT; leave it out of target_modules"
        )


def adapter_specs(
    rules: Sequence[Rule], base_specs: Sequence[TensorSpec], dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors of a PEFT folder, in the order of the base model's, from the rules of adapters and its weights."""
    ranks = {
        name: rule.rank for rule in rules if isinstance(rule, AdapterInputs | AdapterRows) for name in rule.hf_names
    }
    specs: list[TensorSpec] = []
    for base in base_specs:
        for tensor in (LORA_A, LORA_B, LORA_MAGNITUDE):
            name = peft_name(base.name, tensor)
            if name in ranks:
                shape = {LORA_A: (ranks[name], base.shape[-1]), LORA_B: (base.shape[0], ranks[name])}
                specs.append(TensorSpec(name, dtype, shape.get(tensor, base.shape[:1])))
    return tuple(specs)
