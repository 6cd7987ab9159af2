"""The configuration of a training run: one plain dataclass a section, one `ConfigContainer` for all.

Every field says what it means and its unit; the names are those that Megatron-Bridge users know. Nothing here
imports Megatron, so a configuration is read and checked before any process group is made (`checks/`), from
YAML and `section.key=value` overrides (`overrides.py`) or in Python:

    cfg = ConfigContainer()
    cfg.model.hf_path = "path/to/hf"
    cfg.train.train_iters = 10
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightcast.trainer.config.checkpoint import CheckpointConfig
from weightcast.trainer.config.comm_overlap import CommOverlapConfig, overlap_record
from weightcast.trainer.config.data import DatasetConfig, TokenizerConfig
from weightcast.trainer.config.logger import LoggerConfig
from weightcast.trainer.config.model import ModelConfig
from weightcast.trainer.config.optimization import DistributedDataParallelConfig, OptimizerConfig, SchedulerConfig
from weightcast.trainer.config.peft import PeftConfig
from weightcast.trainer.config.precision import MixedPrecisionConfig, precision_record
from weightcast.trainer.config.profiling import ProfilingConfig
from weightcast.trainer.config.publish import PublishConfig, delta_mode, parse_policy
from weightcast.trainer.config.training import DistributedInitConfig, RNGConfig, TrainConfig

__all__ = [
    "SHORT_FORMS",
    "CheckpointConfig",
    "CommOverlapConfig",
    "ConfigContainer",
    "DatasetConfig",
    "DistributedDataParallelConfig",
    "DistributedInitConfig",
    "LoggerConfig",
    "MixedPrecisionConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PeftConfig",
    "ProfilingConfig",
    "PublishConfig",
    "RNGConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "delta_mode",
    "parse_policy",
]


@dataclass(slots=True, kw_only=True)
class ConfigContainer:
    """All sections of a run. `model` is a `ModelConfig` or a finalised provider of `AutoBridge`."""

    model: Any = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)
    dist: DistributedInitConfig = field(default_factory=DistributedInitConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    mixed_precision: Any = None
    """A name, such as `bf16_mixed` (bf16 weights, fp32 masters), `fp16_mixed` or `fp32`, a `MixedPrecisionConfig`, or
    null for what the checkpoint's dtype says; with Transformer Engine also products in 8 or 4 bits (`precision.py`)."""
    comm_overlap: Any = None
    """A `CommOverlapConfig`: which communication goes on behind computation; null overlaps what `ddp` says alone."""


SHORT_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "mixed_precision": precision_record,
    "comm_overlap": overlap_record,
}
"""Sections that may be null or a name in place of their record, and what makes the record of either."""
