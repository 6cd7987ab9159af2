"""Multi-head latent attention (DeepSeek): its layer spec with and without Transformer Engine.

Queries, keys and values are made from low-rank latents that have norms of their own; a part of each head is rotated.
`latent_attention` puts it into a finished layer spec, whatever the layer's MLP is. Without Transformer Engine the
modules are Megatron's parallel linears with this folder's norms and core attention, in the same global keys: the norm
of a latent is `layer_norm_weight` of the linear behind it. `LatentSelfAttention` also mends gradients that Megatron
gets wrong there under tensor parallelism.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import nn

from weightcast.bridges.layers.core_attention import SdpaAttention
from weightcast.bridges.layers.mla_router import GroupLimitedRouter
from weightcast.bridges.layers.moe import with_router
from weightcast.bridges.layers.norms import norm_class
from weightcast.bridges.layers.spec_parts import submodules_of
from weightcast.bridges.layers.sum_gradient import sum_gradient
from weightcast.bridges.runtime import has_transformer_engine

# Transformer Engine fuses the norm of a latent into the linear behind it; its spelling is the global one.
_LATENT_NORM_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
# Latent attention reads its input twice, so the norm before it is fused into neither linear and keeps its own key.
_FUSED_INPUT_NORM = "input_layernorm."


class SpecifiedLatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Megatron's latent attention of exactly the modules of its spec.

    megatron-core 0.19 places the norms of latents itself: a model without a latent of queries would get a norm over
    whole queries, which HF's have not, and a norm with an epsilon of its own would lose it.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class LatentSelfAttention(SpecifiedLatentAttention):
    """Megatron's latent attention for its own linears, with the whole gradients of what all heads share.

    The heads are spread over the tensor parallel ranks. Megatron leaves the gradient of the rotated key, which is one
    for all heads, as one rank's share of the sum, and without sequence parallelism sums the query norm's once too
    often (`_allreduce_non_tensor_model_parallel_grads` takes it for a norm of single heads).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.tensor_model_parallel_size == 1:
            return
        self.linear_kv_down_proj.register_forward_hook(self._gather_latent)
        if config.q_lora_rank is not None and not config.sequence_parallel:
            for parameter in self.q_layernorm.parameters():
                parameter.average_gradients_across_tp_domain = True

    def _gather_latent(
        self, module: nn.Module, inputs: object, output: tuple[torch.Tensor, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Latent and rotated key of [s, b, latent + rotated], whole on every rank, or its own positions [s / TP, ...].

        Megatron gathers the rotated key from the positions itself then, and sums its gradient.
        """
        whole = gather_from_tensor_model_parallel_region(output[0])
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(whole), output[1]
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        latent, rotated_key = torch.split(whole, sizes, dim=-1)
        return torch.cat([latent, sum_gradient(rotated_key, self.pg_collection.tp)], dim=-1), output[1]


def with_norm_epsilon(module: type[nn.Module], epsilon: float) -> type[nn.Module]:
    """`module`, a norm or a linear with a fused norm, with another epsilon than the model's other norms."""

    class WithNormEpsilon(module):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            config = copy.copy(config)
            config.layernorm_epsilon = epsilon
            if "eps" in kwargs:
                kwargs["eps"] = epsilon
            super().__init__(*args, config=config, **kwargs)

    WithNormEpsilon.__name__ = f"{module.__name__}WithNormEpsilon"
    return WithNormEpsilon


def _local_submodules(config: TransformerConfig) -> MLASelfAttentionSubmodules:
    backend = LocalSpecProvider()
    norm = with_norm_epsilon(norm_class(config.normalization), config.latent_layernorm_epsilon)
    linear = backend.column_parallel_linear()
    return MLASelfAttentionSubmodules(
        linear_q_proj=linear,
        linear_q_down_proj=linear,
        linear_q_up_proj=linear,
        linear_kv_down_proj=linear,
        linear_kv_up_proj=linear,
        core_attention=SdpaAttention,
        linear_proj=backend.row_parallel_linear(),
        # Without a latent of queries there is nothing for this norm to stand on; megatron-core 0.19 refuses one.
        q_layernorm=norm if config.qk_layernorm and config.q_lora_rank is not None else IdentityOp,
        kv_layernorm=norm if config.qk_layernorm else IdentityOp,
    )


def _transformer_engine_submodules(config: TransformerConfig) -> MLASelfAttentionSubmodules:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    backend = TESpecProvider()
    linear = backend.column_parallel_linear()
    up = linear
    if config.qk_layernorm:
        up = with_norm_epsilon(backend.column_parallel_layer_norm_linear(), config.latent_layernorm_epsilon)
    return MLASelfAttentionSubmodules(
        linear_q_proj=linear,
        linear_q_down_proj=backend.linear(),
        linear_q_up_proj=up,
        linear_kv_down_proj=backend.linear(),
        linear_kv_up_proj=up,
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=IdentityOp,
        kv_layernorm=IdentityOp,
    )


def _input_norm(config: TransformerConfig) -> type[nn.Module]:
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm  # type: ignore[no-any-return]
    return norm_class(config.normalization)


def latent_attention(config: TransformerConfig, layer: ModuleSpec) -> ModuleSpec:
    """`layer` with latent attention in place of its own attention; its MLP, dense or of experts, stays.

    Where the model scores groups of experts in its own way, so does the router. `config` is an `MLAModelProvider`.
    """
    with_engine = has_transformer_engine()
    attention = ModuleSpec(
        module=SpecifiedLatentAttention if with_engine else LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=_transformer_engine_submodules(config) if with_engine else _local_submodules(config),
    )
    kept: dict[str, str] = layer.submodules.sharded_state_dict_keys_map
    keys = {ours: theirs for ours, theirs in kept.items() if ours != _FUSED_INPUT_NORM}
    submodules = replace(
        layer.submodules,
        input_layernorm=_input_norm(config),
        self_attention=attention,
        sharded_state_dict_keys_map=keys if with_engine else keys | _LATENT_NORM_KEYS,
    )
    layer = replace(layer, submodules=submodules)
    if (
        isinstance(submodules_of(layer.submodules.mlp), MoESubmodules)
        and config.moe_router_group_score_experts is not None
    ):
        layer = with_router(layer, GroupLimitedRouter)
    return layer
