"""What a run does to a new model before it is wrapped: load the base, freeze it, put the adapters on.

model = provider.provide_distributed_model(pre_wrap_hook=prepare_hook(cfg, bridge))
"""

from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import nn

from weightcast.bridges import AutoBridge
from weightcast.bridges.provider import ModelHook
from weightcast.bridges.shards import unwrap_chunks
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.peft.pretrained import load_pretrained
from weightcast.trainer.peft.schemes import make_method


def freeze_settings(config: ConfigContainer, provider: Any) -> None:
    """Settings of the model that a frozen base and its adapters want; nothing for a run without. Before `finalize`.

    Megatron would move the bias by which routers balance experts (DeepSeek V3) in each step, and it is the base's.
    """
    if config.peft.is_used and getattr(provider, "moe_router_enable_expert_bias", False):
        provider.moe_router_bias_update_rate = 0.0


def prepare_hook(config: ConfigContainer, bridge: AutoBridge | None) -> ModelHook | None:
    """The hook of a run's new model; it is a collective.

    None for a run without adapters, which takes its weights when it starts (`starting.py`).
    """
    if not config.peft.is_used:
        return None
    return partial(_prepare, config=config, bridge=bridge)


def _prepare(model: list[Any], config: ConfigContainer, bridge: AutoBridge | None) -> None:
    if config.checkpoint.pretrained_checkpoint is not None:
        load_pretrained(model, config.checkpoint.pretrained_checkpoint)
    chunks = unwrap_chunks(model)
    method = make_method(config.peft, chunks[0].config)
    if method is not None:
        method.apply(model)
    if config.peft.load_adapter is not None:
        assert bridge is not None
        bridge.load_hf_adapter(model, config.peft.load_adapter)
    for chunk in chunks:
        if getattr(chunk.config, "recompute_granularity", None) is not None:
            let_gradients_through(chunk)


def let_gradients_through(chunk: nn.Module) -> None:
    """Make a frozen embedding's output want a gradient.

    A function whose activations are recomputed gives its parameters gradients only where one of its inputs wants one,
    and behind a frozen embedding none does: the adapters of the first layers would never train.
    """
    for module in chunk.modules():
        if isinstance(module, LanguageModelEmbedding):
            module.register_forward_hook(_want_gradient)


def _want_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()
