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
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
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
from weightcast.bridges.layers.moe import expert_layers, expert_mlp, with_quiet_shared_experts
from weightcast.bridges.layers.moe_bias import with_expert_biases
from weightcast.bridges.layers.mtp import prediction_block
from weightcast.bridges.layers.norms import norm_class
from weightcast.bridges.layers.rope import RopePerLayerAttention
from weightcast.bridges.layers.spec_parts import submodules_of, with_parts
from weightcast.bridges.runtime import has_transformer_engine


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


def local_layer(config: TransformerConfig, has_experts: bool = False) -> ModuleSpec:
    """One layer from Megatron's parallel linears and this folder's modules, dense or with experts."""
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
    # Transformer Engine fuses these norms into the linears behind them; its spelling is the global one.
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not has_experts:  # a router stands between the norm and the experts
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=expert_mlp(config, backend) if has_experts else get_mlp_module_spec_for_backend(backend=backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def transformer_engine_layer(config: TransformerConfig, has_experts: bool = False) -> ModuleSpec:
    """One layer as Megatron specifies it for Transformer Engine, dense or with experts."""
    experts = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    return get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm,
        use_te_activation_func=config.use_te_activation_func,
        **(experts if has_experts else {}),
    )


def attention_variant(config: TransformerConfig, attention: Any) -> ModuleSpec:
    """The spec `attention` with what this model has beyond a plain one: biases, a norm behind it, its own rope."""
    qkv, proj = attention.submodules.linear_qkv, attention.submodules.linear_proj
    if config.qkv_bias is not None:
        qkv = with_bias(qkv, config.qkv_bias)
    if config.attention_output_bias is not None:
        proj = with_bias(proj, config.attention_output_bias)
    if config.post_norms:
        proj = with_post_norm(proj, final_norm(config))
    core = attention.submodules.core_attention
    if config.attn_logit_softcapping is not None:
        core = SdpaAttention  # Transformer Engine's kernels cap no scores
    return replace(
        attention,
        module=RopePerLayerAttention if config.rotary_base_local is not None else attention.module,
        submodules=replace(attention.submodules, linear_qkv=qkv, core_attention=core, linear_proj=proj),
    )


def dense_mlp_variant(config: TransformerConfig, mlp: Any) -> Any:
    """The spec `mlp` of a dense layer with this model's biases and a norm behind it."""
    submodules = submodules_of(mlp)
    fc1, fc2 = submodules.linear_fc1, submodules.linear_fc2
    if config.mlp_bias is not None:
        fc1, fc2 = with_bias(fc1, config.mlp_bias), with_bias(fc2, config.mlp_bias)
    if config.post_norms:
        fc2 = with_post_norm(fc2, final_norm(config))
    return with_parts(
        mlp,
        params={"ffn_hidden_size": config.ffn_hidden_size},  # Megatron warns of an MLP that takes its own
        submodules=replace(submodules, linear_fc1=fc1, linear_fc2=fc2),
    )


def variants(config: TransformerConfig, layer: ModuleSpec, has_experts: bool = False) -> ModuleSpec:
    """`layer` with what this model has beyond a plain one.

    Reads `qkv_bias`, `attention_output_bias`, `mlp_bias`, `moe_bias`, `post_norms`, `rotary_base_local` and
    `attn_logit_softcapping` of a `GPTModelProvider`; `mlp_bias` and the norm behind an MLP are of dense layers only.
    """
    attention = attention_variant(config, layer.submodules.self_attention)
    mlp = layer.submodules.mlp
    mlp = with_quiet_shared_experts(mlp) if has_experts else dense_mlp_variant(config, mlp)
    if has_experts and config.moe_bias:
        mlp = with_expert_biases(mlp)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention, mlp=mlp))


def layer_spec(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    """The spec of this model's dense layers, or of those with experts."""
    plain = transformer_engine_layer if has_transformer_engine() else local_layer
    layer = variants(config, plain(config, has_experts), has_experts)
    return latent_attention(config, layer) if config.multi_latent_attention else layer


def layer_specs(config: TransformerConfig) -> list[ModuleSpec]:
    """The specs of all layers of the model, in order."""
    pattern = expert_layers(config)
    specs = {has_experts: layer_spec(config, has_experts) for has_experts in set(pattern)}
    return [specs[has_experts] for has_experts in pattern]


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


def prediction_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The layers for multi-token prediction of this pipeline stage, of the kind of the model's last one, or None."""
    return prediction_block(config, layer_specs(config)[-1], final_norm(config), vp_stage)
