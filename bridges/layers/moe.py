"""Mixture-of-experts layers: what stands in a layer's MLP where a router sends each token to a few experts.

With Transformer Engine the experts are Megatron's grouped MLP; elsewhere they are its `SequentialMLP` over the parallel
linears, which runs on CPUs and GPUs alike. The keys that `sharded_state_dict` gives are the same for both: all experts
of a layer under one key, along an axis in front.
"""

import warnings
from dataclasses import replace
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import nn

from weightcast.bridges.layers.spec_parts import submodules_of, with_parts


class SharedExperts(SharedExpertMLP):  # type: ignore[misc]
    """Megatron's experts that see every token, without its warning that their size comes from the configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "MLP requires ffn_hidden_size", DeprecationWarning)
            super().__init__(*args, **kwargs)


def expert_layers(config: TransformerConfig) -> list[bool]:
    """For each layer of the model whether it has experts, by `num_moe_experts` and `moe_layer_freq`.

    A list holds 1 for each layer with experts; a number n puts them into every n-th layer from the first.
    """
    if not config.num_moe_experts:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [layer % config.moe_layer_freq == 0 for layer in range(config.num_layers)]
    return [bool(flag) for flag in config.moe_layer_freq]


def expert_mlp(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Router, experts and shared experts from the modules of `backend`."""
    return get_moe_module_spec_for_backend(
        backend=backend, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )


def with_quiet_shared_experts(mlp: Any) -> Any:
    """`mlp`, the spec of an MoE layer, with `SharedExperts`."""
    submodules = submodules_of(mlp)
    shared = with_parts(submodules.shared_experts, module=SharedExperts)
    return with_parts(mlp, submodules=replace(submodules, shared_experts=shared))


def with_router(layer: ModuleSpec, router: type[nn.Module]) -> ModuleSpec:
    """`layer`, the spec of a transformer layer with experts, with another class of router."""
    mlp: Any = layer.submodules.mlp
    mlp = with_parts(mlp, submodules=replace(submodules_of(mlp), router=router))
    return replace(layer, submodules=replace(layer.submodules, mlp=mlp))
