"""Bridges: where each byte of a Hugging Face model lies in a Megatron-Core model, and how it gets there and back.

    from weightcast.bridges import AutoBridge

Names are loaded when they are first used; importing the package starts neither CUDA nor the CPU runtime.
"""

import importlib
from typing import TYPE_CHECKING, Any

import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)

if TYPE_CHECKING:
    from weightcast.bridges.auto import AutoBridge
    from weightcast.bridges.hf_export import HFWeightTuple
    from weightcast.bridges.models.bridge import ModelBridge
    from weightcast.bridges.plan import Plan, WeightConversionTask, build_plan
    from weightcast.bridges.provider import GPTModelProvider
    from weightcast.bridges.rules import FusedQkv, GatedMlp, Rename, Tied, Vocab
    from weightcast.bridges.rules_concat import ConcatQkv
    from weightcast.bridges.rules_experts import InterleavedGatedMlp, PerExpert, StackedExperts, Transposed
    from weightcast.bridges.source import PlanSource

_HOMES = {
    "AutoBridge": "auto",
    "ConcatQkv": "rules_concat",
    "FusedQkv": "rules",
    "GPTModelProvider": "provider",
    "GatedMlp": "rules",
    "HFWeightTuple": "hf_export",
    "InterleavedGatedMlp": "rules_experts",
    "ModelBridge": "models.bridge",
    "PerExpert": "rules_experts",
    "Plan": "plan",
    "PlanSource": "source",
    "Rename": "rules",
    "StackedExperts": "rules_experts",
    "Tied": "rules",
    "Transposed": "rules_experts",
    "Vocab": "rules",
    "WeightConversionTask": "plan",
    "build_plan": "plan",
}
__all__ = [
    "AutoBridge",
    "ConcatQkv",
    "FusedQkv",
    "GPTModelProvider",
    "GatedMlp",
    "HFWeightTuple",
    "InterleavedGatedMlp",
    "ModelBridge",
    "PerExpert",
    "Plan",
    "PlanSource",
    "Rename",
    "StackedExperts",
    "Tied",
    "Transposed",
    "Vocab",
    "WeightConversionTask",
    "build_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
