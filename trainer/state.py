"""A run's moving parts in one record: model, optimizer, schedule, and how far training has come.

state = build_state(cfg, layout)
"""

from dataclasses import dataclass
from typing import Any

from weightcast.trainer.checks import Layout
from weightcast.trainer.config import ConfigContainer


@dataclass(slots=True)
class TrainState:
    """What training changes, on one rank."""

    config: ConfigContainer
    layout: Layout
    provider: Any
    """The provider that the model was built from."""
    model: list[Any]
    """Chunks of the model, wrapped with DDP; more than one with a virtual pipeline."""
    optimizer: Any
    scheduler: Any
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Samples trained on so far, over all data-parallel ranks: the position in the data."""


def unwrap(module: Any) -> Any:
    """The Megatron model inside its wrappers (DDP, bf16)."""
    while hasattr(module, "module"):
        module = module.module
    return module
