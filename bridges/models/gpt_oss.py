"""gpt-oss: experts with biases and a clamped gate in every layer, attention sinks, every other layer with a window.

HF stacks the experts, transposed, with the columns of gate and up in turns; the published checkpoints store them in
MXFP4 (`codecs_mxfp4`), which is decoded as it is read. Exports have HF's names and layout, in bf16.
"""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    bias_fields,
    decoder_fields,
    quick_gelu,
    refuse,
    rope_fields,
    rope_parameters,
    sliding_window_fields,
)
from weightcast.bridges.config_moe import attention_only_bias, expert_fields, softmax_router_fields
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rename, Rule
from weightcast.bridges.rules_experts import InterleavedGatedMlp, StackedExperts, Transposed

_QUICK_GELU_ALPHA = 1.702

_ATTENTION, _HF_ATTENTION = f"{tables.MEGATRON_LAYER}self_attention.", f"{tables.HF_LAYER}self_attn."
_MLP, _HF_MLP = f"{tables.MEGATRON_LAYER}mlp.", f"{tables.HF_LAYER}mlp."

SINKS: tuple[Rule, ...] = (Rename(f"{_ATTENTION}core_attention.softmax_offset", f"{_HF_ATTENTION}sinks"),)
ROUTER: tuple[Rule, ...] = tuple(
    Rename(f"{_MLP}router.{kind}", f"{_HF_MLP}router.{kind}") for kind in ("weight", "bias")
)


def experts(num_experts: int) -> tuple[Rule, ...]:
    """The experts' rows: HF's weights are [experts, in, out], its biases [experts, out]."""
    megatron, hf = f"{_MLP}experts.experts.", f"{_HF_MLP}experts."
    return tuple(
        StackedExperts(rule, num_experts)
        for rule in (
            Transposed(InterleavedGatedMlp(f"{megatron}linear_fc1.weight", f"{hf}gate_up_proj")),
            InterleavedGatedMlp(f"{megatron}linear_fc1.bias", f"{hf}gate_up_proj_bias"),
            Transposed(Rename(f"{megatron}linear_fc2.weight", f"{hf}down_proj")),
            Rename(f"{megatron}linear_fc2.bias", f"{hf}down_proj_bias"),
        )
    )


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `GptOssForCausalLM` configuration."""
    alpha = getattr(hf, "swiglu_alpha", _QUICK_GELU_ALPHA)
    if alpha != _QUICK_GELU_ALPHA:
        why = "the gate of experts is quick GELU, which has one constant"
        refuse(hf, "swiglu_alpha", alpha, why, f"it must be {_QUICK_GELU_ALPHA}")
    return GPTModelProvider(
        **decoder_fields(hf)
        | attention_only_bias(bias_fields(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=False))
        | sliding_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf))
        | expert_fields(
            hf,
            num_experts=hf.num_local_experts,
            ffn_hidden_size=hf.intermediate_size,
            has_experts=[True] * hf.num_hidden_layers,
        )
        | softmax_router_fields(hf, normalised=True)
        | {
            "activation_func": quick_gelu,
            "activation_func_clamp_value": float(hf.swiglu_limit),
            "glu_linear_offset": 1.0,
            "moe_bias": True,
            "softmax_type": "learnable",
        }
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `GptOssForCausalLM` configuration."""
    biases = tables.QKV_BIAS + tables.ATTENTION_OUTPUT_BIAS if hf.attention_bias else ()
    return (
        tables.EMBEDDING_AND_FINAL_NORM
        + tables.ATTENTION_NORM
        + tables.ATTENTION
        + biases
        + SINKS
        + tables.PRE_MLP_NORM
        + ROUTER
        + experts(hf.num_local_experts)
        + tables.output(hf)
    )


GPT_OSS = ModelBridge("gpt-oss", ("GptOssForCausalLM",), rules, translate)
