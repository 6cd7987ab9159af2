"""Rope settings of an HF configuration as provider fields.

transformers 5 keeps them in `rope_parameters`; older configurations' `rope_theta` and `rope_scaling` are read as well.
Types and numbers are those of transformers' `modeling_rope_utils`; what is not computed here is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from weightcast.bridges.config_refusals import Fields, refuse
from weightcast.bridges.layers.rope import LongRope, Yarn

_DEFAULT_THETA = 10000.0  # what transformers takes where a configuration says nothing, as Llama 2's does

_NEEDED: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "longrope": frozenset({"short_factor", "long_factor", "original_max_position_embeddings"}),
}
_OPTIONAL: Mapping[str, frozenset[str]] = {
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"attention_factor", "factor"}),
}
# Present in some configurations of any type, and without effect for those that do not need them.
_OF_ANY_TYPE = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    }
)


def rope_parameters(hf: PretrainedConfig) -> dict[str, Any]:
    """The rope settings as transformers 5 writes them, also from the fields of older configurations."""
    parameters = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
    by_kind_of_layer = any(isinstance(value, Mapping) for value in parameters.values())
    if not by_kind_of_layer:
        parameters.setdefault("rope_theta", getattr(hf, "rope_theta", _DEFAULT_THETA))
    return parameters


def rope_fields(hf: PretrainedConfig, parameters: Mapping[str, Any], *, partial: bool = False) -> Fields:
    """Provider fields for one set of rope parameters; refuses every type and number that is not computed here.

    `partial` says that the model's HF class rotates only `partial_rotary_factor` of each head (others ignore it).
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _NEEDED:
        refuse(hf, "rope_parameters.rope_type", kind, "no such rope here", f"one of {sorted(_NEEDED)} works")
    percent = _rotated_share(hf, parameters, partial)
    for name in sorted(_NEEDED[kind] - parameters.keys()):
        refuse(hf, f"rope_parameters.{name}", None, f"rope type {kind} needs it", "set it in the configuration")
    known = _NEEDED[kind] | _OPTIONAL.get(kind, frozenset()) | _OF_ANY_TYPE
    for name in sorted(parameters.keys() - known):
        if parameters[name] is not None:
            refuse(hf, f"rope_parameters.{name}", parameters[name], f"rope type {kind} has no such number", "remove it")
    fields: Fields = {"rotary_base": float(parameters["rope_theta"])}
    if percent != 1.0:
        fields["rotary_percent"] = percent
    if kind == "linear":
        fields["seq_len_interpolation_factor"] = float(parameters["factor"])
    if kind == "llama3":
        fields |= _llama3_fields(parameters)
    if kind == "yarn":
        fields["rope_extension"] = _yarn(hf, parameters)
    if kind == "longrope":
        fields["rope_extension"] = _longrope(hf, parameters, percent)
    return fields


def _rotated_share(hf: PretrainedConfig, parameters: Mapping[str, Any], partial: bool) -> float:
    share = parameters.get("partial_rotary_factor")
    if share is None:
        share = getattr(hf, "partial_rotary_factor", None) if partial else None
    share = 1.0 if share is None else float(share)
    if share != 1.0 and not partial:
        refuse(hf, "rope_parameters.partial_rotary_factor", share, "the whole head is rotated", "set it to 1.0")
    if not 0.0 < share <= 1.0:
        refuse(hf, "rope_parameters.partial_rotary_factor", share, "it is a share of the head", "set it in (0, 1]")
    return share


def _llama3_fields(parameters: Mapping[str, Any]) -> Fields:
    return {
        "rope_scaling": True,
        "rope_scaling_factor": float(parameters["factor"]),
        "rope_low_freq_factor": float(parameters["low_freq_factor"]),
        "rope_high_freq_factor": float(parameters["high_freq_factor"]),
        "rope_original_max_position_embeddings": int(parameters["original_max_position_embeddings"]),
    }


def _factor(hf: PretrainedConfig, parameters: Mapping[str, Any]) -> float:
    """How much longer the context has become; transformers takes the ratio of the lengths where it is not named."""
    named = parameters.get("factor")
    ratio: float = hf.max_position_embeddings / parameters["original_max_position_embeddings"]
    return float(named) if named is not None else ratio


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(hf: PretrainedConfig, parameters: Mapping[str, Any]) -> Yarn:
    factor = _factor(hf, parameters)
    attention_factor = parameters.get("attention_factor")
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
        attention_factor=float(attention_factor) if attention_factor is not None else _yarn_scale(factor),
        beta_fast=float(parameters.get("beta_fast") or 32),  # transformers, too, takes 0 for unset
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
    )


def _longrope(hf: PretrainedConfig, parameters: Mapping[str, Any], percent: float) -> LongRope:
    named = getattr(hf, "head_dim", None)
    size = named if named is not None else hf.hidden_size // hf.num_attention_heads
    num_pairs = int(size * percent) // 2
    for name in ("short_factor", "long_factor"):
        if len(parameters[name]) != num_pairs:
            why = f"{num_pairs} pairs of each head's dimensions are rotated, so it must hold {num_pairs} numbers"
            refuse(hf, f"rope_parameters.{name}", parameters[name], why, "correct the configuration")
    original, factor = int(parameters["original_max_position_embeddings"]), _factor(hf, parameters)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        short_factor=tuple(map(float, parameters["short_factor"])),
        long_factor=tuple(map(float, parameters["long_factor"])),
        original_max_position_embeddings=original,
        attention_factor=float(attention_factor),
    )
