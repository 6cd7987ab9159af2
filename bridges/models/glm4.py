"""GLM-4, dense: a rope that turns neighbouring pairs in half of each head, a fused gate and up, and, since GLM-4-0414,
norms behind attention and MLP as well as before them.
"""

from transformers import PretrainedConfig

from weightcast.bridges.config import activation, bias_fields, decoder_fields, rope_fields, rope_parameters
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rename, Rule

_LAYER, _HF_LAYER = tables.MEGATRON_LAYER, tables.HF_LAYER

_FUSED_MLP: tuple[Rule, ...] = (
    Rename(f"{_LAYER}mlp.linear_fc1.weight", f"{_HF_LAYER}mlp.gate_up_proj.weight"),  # [gate; up] in both
    Rename(f"{_LAYER}mlp.linear_fc2.weight", f"{_HF_LAYER}mlp.down_proj.weight"),
)
_POST_NORMS: tuple[Rule, ...] = (
    Rename(f"{_LAYER}self_attention.linear_proj.post_layernorm.weight", f"{_HF_LAYER}post_self_attn_layernorm.weight"),
    Rename(f"{_LAYER}mlp.linear_fc2.post_layernorm.weight", f"{_HF_LAYER}post_mlp_layernorm.weight"),
)


def translate_glm(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `GlmForCausalLM` configuration; `attention_bias` is of q, k and v alone."""
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=hf.attention_bias, attention_output=False, mlp=False)
        | rope_fields(hf, rope_parameters(hf), partial=True)
        | {"activation_func": activation(hf), "rotary_interleaved": True}
    )


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Glm4ForCausalLM` configuration."""
    provider = translate_glm(hf)
    provider.post_norms = True
    return provider


def rules_glm(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `GlmForCausalLM` configuration."""
    biases = tables.QKV_BIAS if hf.attention_bias else ()
    return (
        tables.EMBEDDING_AND_FINAL_NORM + tables.ATTENTION + _FUSED_MLP + tables.PRE_NORMS + biases + tables.output(hf)
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Glm4ForCausalLM` configuration."""
    return rules_glm(hf) + _POST_NORMS


GLM = ModelBridge("glm", ("GlmForCausalLM",), rules_glm, translate_glm)
GLM4 = ModelBridge("glm4", ("Glm4ForCausalLM",), rules, translate)
