"""What weightcast knows of one family of models: which HF architectures it covers, its rules, its translation."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rule
from weightcast.bridges.spellings import Spelling


@dataclass(frozen=True)
class ModelBridge:
    """A family of models. All of it is data and pure functions of the HF configuration."""

    family: str
    architectures: tuple[str, ...]
    """Names of the HF model classes, as in the `architectures` field of config.json."""
    rules: Callable[[PretrainedConfig], tuple[Rule, ...]]
    """Where each HF tensor lies in Megatron's; depends on the configuration where tensors do."""
    translate: Callable[[PretrainedConfig], GPTModelProvider]
    """The provider of the same model; raises UnsupportedModel for what Megatron would compute differently."""
    spellings: tuple[Spelling, ...] = ()
    """Other HF names under which checkpoints of the family exist."""
    in_memory: Spelling = field(default_factory=dict)
    """The one of `spellings` that the HF model has in memory, by which PEFT goes; empty for the rules' own names."""
    prediction_layers: bool = False
    """Checkpoints may hold layers for multi-token prediction, as `models.prediction` says."""
