"""Settings of one update: its rank, and what B·A is multiplied with; all alike, or other ones by patterns. Pure.

`peft` matches the keys of `rank_pattern` and `alpha_pattern` as regular expressions with the end of a module's name,
and the first that fits counts; a recipe has patterns of the same names whose keys are targets of Megatron's linears.
Both are written as short as they can be: a last name where all adapted modules of the name have the value.

    find_settings(UpdateSettings(16, 32, False), {"v_proj": 8}, {}, ["model.layers.0.self_attn.v_proj.weight"])
    shorten({"layers.0.v_proj": 8, "layers.1.v_proj": 8}, default=16)  # {"v_proj": 8}
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """Of the update B·A of one weight."""

    rank: int
    alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        """What B·A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def find_settings(
    default: UpdateSettings,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    weights: Iterable[str],
) -> dict[str, UpdateSettings]:
    """The settings of each of a PEFT folder's adapted `weights`, by HF's names. Raises `re.error` for a broken key."""
    ranks, alphas = _compile(rank_pattern), _compile(alpha_pattern)
    return {
        weight: UpdateSettings(
            _first_match(ranks, weight.removesuffix(".weight"), default.rank),
            _first_match(alphas, weight.removesuffix(".weight"), default.alpha),
            default.use_rslora,
        )
        for weight in weights
    }


def _compile(pattern: Mapping[str, Value]) -> list[tuple[re.Pattern[str], Value]]:
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]


def _first_match(keys: Iterable[tuple[re.Pattern[str], Value]], module: str, default: Value) -> Value:
    return next((value for key, value in keys if key.match(module)), default)


def shorten(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """A pattern for the `values` of modules by name, without those that have the default."""
    by_last_name: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        by_last_name.setdefault(name.rpartition(".")[2], {})[name] = value
    pattern: dict[str, Value] = {}
    for last_name, own in by_last_name.items():
        others = {name: value for name, value in own.items() if value != default}
        alike = len(set(own.values())) == 1
        pattern |= {last_name: next(iter(others.values()))} if alike and others else others
    return pattern
