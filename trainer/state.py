"""A run's moving parts in one record: model, optimizer, schedule, and how far training has come.

provider, bridge = make_provider(cfg, bridge=None)
state = build_state(cfg, provider)
"""

from dataclasses import dataclass
from typing import Any

from weightcast.bridges import AutoBridge
from weightcast.bridges.process_groups import initialize_distributed
from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.model import check_provider
from weightcast.trainer.comm_overlap import apply_overlap, start_user_buffers, stop_user_buffers
from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.mixed_precision import apply_precision
from weightcast.trainer.model_source import open_model
from weightcast.trainer.optim import make_ddp_config, make_optimizer, make_scheduler
from weightcast.trainer.peft.prepare import freeze_settings, prepare_hook
from weightcast.trainer.peft.schemes import check_adapter_folder, make_method
from weightcast.trainer.releasing import let_go


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

    def release(self) -> None:
        """Let the model go once nobody else has it; it cannot be trained any more (`releasing.py`)."""
        let_go(self.model)
        stop_user_buffers(self.provider)

    def gather_parameters(self) -> None:
        """Make the parameters whole after a step whose gathering was put off until the next forward pass."""
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def make_provider(config: ConfigContainer, bridge: AutoBridge | None) -> tuple[Any, AutoBridge | None]:
    """The provider that `config.model` is or asks for, finalised, and the bridge it came from, where there is one.

    Makes no process group. Raises `ConfigError` for settings that do not fit the model.
    """
    check_adapter_folder(config.peft)
    if isinstance(config.model, ModelConfig):
        loads = config.checkpoint.pretrained_checkpoint is None
        bridge, provider = open_model(config.model, load_weights=loads)
    else:
        provider = config.model
    provider.seed = config.rng.seed
    apply_precision(config.mixed_precision, provider)
    apply_overlap(config, provider)
    check_provider(config, provider)
    make_method(config.peft, provider)  # for its errors
    freeze_settings(config, provider)
    provider.finalize()
    if config.dataset.seq_length > provider.seq_length:
        raise ConfigError(
            f"dataset.seq_length={config.dataset.seq_length} is longer than the {provider.seq_length} tokens that the "
            f"model is made for: lower it"
        )
    return provider, bridge


def build_state(config: ConfigContainer, provider: Any, bridge: AutoBridge | None = None) -> TrainState:
    """Model, optimizer and schedule at step 0. Every rank calls it; a collective that makes what groups are missing.

    `bridge` is needed for `peft.load_adapter` alone.
    """
    initialize_distributed(timeout_s=config.dist.distributed_timeout_minutes * 60)
    start_user_buffers(config, provider)
    model = provider.provide_distributed_model(
        ddp_config=make_ddp_config(config, provider), wrap_with_ddp=True, pre_wrap_hook=prepare_hook(config, bridge)
    )
    optimizer = make_optimizer(config, model)
    return TrainState(config, provider, model, optimizer, make_scheduler(config, optimizer))


def unwrap(module: Any) -> Any:
    """The Megatron model inside its wrappers (DDP, bf16)."""
    while hasattr(module, "module"):
        module = module.module
    return module
