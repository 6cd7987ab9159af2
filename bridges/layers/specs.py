"""Layer specs: which module stands in each place of a transformer layer, with and without Transformer Engine.

`block_spec(config, vp_stage)` gives the layers of this pipeline stage. With Transformer Engine they are Megatron's own
spec for it; elsewhere they are Megatron's parallel linears with the norms and the core attention of this folder, which
run on CPUs and GPUs alike. Either way `variants` then applies what the model asks beyond a plain Llama layer. The keys
that `sharded_state_dict` gives are the same for both.
"""

from dataclasses import replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from weightcast.bridges.layers.core_attention import SdpaAttention
from weightcast.bridges.layers.linears import with_bias, with_post_norm
from weightcast.bridges.layers.mla import latent_attention
from weightcast.bridges.layers.norms import norm_class
from weightcast.bridges.layers.rope import RopePerLayerAttention
from weightcast.bridges.runtime import has_transformer_engine
from weightcast.sync.errors import ConfigError


class SdpaSpecProvider(LocalSpecProvider):  # type: ignore[misc]
    """Megatron's choice of local modules with this folder's norms and core attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type[nn.Module]:
        return norm_class("RMSNorm" if rms_norm else "LayerNorm")

    def core_attention(self) -> type[nn.Module]:
        return SdpaAttention


def final_norm(config: TransformerConfig) -> type[nn.Module]:
    """The class of the norms that stand alone: the final one, and those behind a linear."""
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm  # type: ignore[no-any-return]
    return norm_class(config.normalization)


def local_layer(config: TransformerConfig) -> ModuleSpec:
    """One dense layer from Megatron's parallel linears and this folder's modules."""
    backend = SdpaSpecProvider()
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    qk_norm = norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend=backend),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine fuses these norms into the linears behind them; its spelling is the global one.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def transformer_engine_layer(config: TransformerConfig) -> ModuleSpec:
    """One dense layer as Megatron specifies it for Transformer Engine."""
    return get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm, use_te_activation_func=config.use_te_activation_func
    )


def variants(config: TransformerConfig, layer: ModuleSpec) -> ModuleSpec:
    """`layer` with what this model has beyond a plain one: biases by place, norms behind linears, its own rope.

    Reads `qkv_bias`, `attention_output_bias`, `mlp_bias`, `post_norms`, `rotary_base_local` and
    `attn_logit_softcapping` of a `GPTModelProvider`.
    """
    attention: Any = layer.submodules.self_attention
    mlp: Any = layer.submodules.mlp
    qkv, proj = attention.submodules.linear_qkv, attention.submodules.linear_proj
    fc1, fc2 = mlp.submodules.linear_fc1, mlp.submodules.linear_fc2
    if config.qkv_bias is not None:
        qkv = with_bias(qkv, config.qkv_bias)
    if config.attention_output_bias is not None:
        proj = with_bias(proj, config.attention_output_bias)
    if config.mlp_bias is not None:
        fc1, fc2 = with_bias(fc1, config.mlp_bias), with_bias(fc2, config.mlp_bias)
    if config.post_norms:
        norm = final_norm(config)
        proj, fc2 = with_post_norm(proj, norm), with_post_norm(fc2, norm)
    core = attention.submodules.core_attention
    if config.attn_logit_softcapping is not None:
        core = SdpaAttention  # Transformer Engine's kernels cap no scores
    attention = replace(
        attention,
        module=RopePerLayerAttention if config.rotary_base_local is not None else attention.module,
        submodules=replace(attention.submodules, linear_qkv=qkv, core_attention=core, linear_proj=proj),
    )
    mlp = replace(
        mlp,
        params=mlp.params | {"ffn_hidden_size": config.ffn_hidden_size},  # Megatron warns of an MLP that takes its own
        submodules=replace(mlp.submodules, linear_fc1=fc1, linear_fc2=fc2),
    )
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention, mlp=mlp))


def layer_specs(config: TransformerConfig) -> list[ModuleSpec]:
    """The specs of all layers of the model, in order. Raises ConfigError for kinds of layers not known here."""
    for setting in ("num_moe_experts", "mtp_num_layers"):
        if getattr(config, setting):
            raise ConfigError(
                f"{setting}={getattr(config, setting)!r} is not supported: only dense layers are built here; unset it"
            )
    layer = transformer_engine_layer(config) if has_transformer_engine() else local_layer(config)
    layer = variants(config, layer)
    if config.multi_latent_attention:
        layer = latent_attention(config, layer)
    return [layer] * config.num_layers


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage and the final norm. Needs Megatron's process groups."""
    layers = layer_specs(config)
    if config.pipeline_model_parallel_layout is not None:
        layout = config.pipeline_model_parallel_layout
        here = [layers[i] for i in layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)]
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        here = layers[offset : offset + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=here, layer_norm=final_norm(config))
