"""A run's moving parts in one record: model, optimizer, schedule, and how far training has come.

provider, bridge = make_provider(cfg, bridge=None)
state = build_state(cfg, provider)
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from weightcast.bridges import AutoBridge
from weightcast.bridges.process_groups import initialize_distributed
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.optim import make_ddp_config, make_optimizer, make_scheduler

DTYPES = {"bf16_mixed": torch.bfloat16, "fp32": torch.float32}


@dataclass(slots=True)
class TrainState:
    """What training changes, on one rank."""

    config: ConfigContainer
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

    def gather_parameters(self) -> None:
        """Make the parameters whole after a step whose gathering was put off until the next forward pass."""
        if self.config.ddp.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)


def make_provider(config: ConfigContainer, bridge: AutoBridge | None) -> tuple[Any, AutoBridge | None]:
    """The provider that `config.model` is or asks for, finalised, and the bridge it came from, where there is one.

    Makes no process group. Raises `ConfigError` for settings that do not fit the model.
    """
    if isinstance(config.model, ModelConfig):
        if not config.model.hf_path:
            raise ConfigError("no model: set model.hf_path to a Hugging Face folder, such as model.hf_path=path/to/hf")
        bridge = AutoBridge.from_hf_pretrained(config.model.hf_path)
        provider = bridge.to_megatron_provider(load_weights=config.model.load_weights)
        for item in fields(config.model):
            if item.name not in ("hf_path", "load_weights"):
                setattr(provider, item.name, getattr(config.model, item.name))
    else:
        provider = config.model
    provider.seed = config.rng.seed
    if config.mixed_precision is not None:
        provider.set_dtype(DTYPES[config.mixed_precision])
    provider.finalize()
    if config.dataset.seq_length > provider.seq_length:
        raise ConfigError(
            f"dataset.seq_length={config.dataset.seq_length} is longer than the {provider.seq_length} tokens that the "
            f"model is made for: lower it"
        )
    return provider, bridge


def build_state(config: ConfigContainer, provider: Any) -> TrainState:
    """Model, optimizer and schedule at step 0. Every rank calls it; a collective that makes what groups are missing."""
    initialize_distributed(timeout_s=config.dist.distributed_timeout_minutes * 60)
    model = provider.provide_distributed_model(ddp_config=make_ddp_config(config), wrap_with_ddp=True)
    optimizer = make_optimizer(config, model)
    return TrainState(config, provider, model, optimizer, make_scheduler(config, optimizer))


def unwrap(module: Any) -> Any:
    """The Megatron model inside its wrappers (DDP, bf16)."""
    while hasattr(module, "module"):
        module = module.module
    return module
