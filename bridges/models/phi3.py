"""Phi-3, 3.5 and 4: fused projections on disk, a rope on part of each head, LongRoPE, a window on all layers."""

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    activation,
    bias_fields,
    decoder_fields,
    require_absent,
    rope_fields,
    rope_parameters,
    uniform_window_fields,
)
from weightcast.bridges.models import tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rules import Rename, Rule
from weightcast.bridges.rules_concat import ConcatQkv

_LAYER, _HF_LAYER = tables.MEGATRON_LAYER, tables.HF_LAYER

_PROJECTIONS: tuple[Rule, ...] = (
    ConcatQkv(f"{_LAYER}self_attention.linear_qkv.weight", f"{_HF_LAYER}self_attn.qkv_proj.weight"),
    Rename(f"{_LAYER}self_attention.linear_proj.weight", f"{_HF_LAYER}self_attn.o_proj.weight"),
    Rename(f"{_LAYER}mlp.linear_fc1.weight", f"{_HF_LAYER}mlp.gate_up_proj.weight"),  # [gate; up] in both
    Rename(f"{_LAYER}mlp.linear_fc2.weight", f"{_HF_LAYER}mlp.down_proj.weight"),
)


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """The provider for a `Phi3ForCausalLM` configuration."""
    require_absent(hf, "resid_pdrop", "Megatron would drop out embeddings as well", (None, 0, 0.0))
    return GPTModelProvider(
        **decoder_fields(hf)
        | bias_fields(qkv=False, attention_output=False, mlp=False)
        | uniform_window_fields(hf)
        | rope_fields(hf, rope_parameters(hf), partial=True)
        | {"activation_func": activation(hf)}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Phi3ForCausalLM` configuration."""
    return tables.EMBEDDING_AND_FINAL_NORM + _PROJECTIONS + tables.PRE_NORMS + tables.output(hf)


PHI3 = ModelBridge("phi3", ("Phi3ForCausalLM",), rules, translate)
