"""The rows that rule tables of models with multi-head latent attention share.

The dimensions that are rotated need no permutation: Megatron rotates neighbouring pairs of latent attention itself.
"""

from transformers import PretrainedConfig

from weightcast.bridges.models.tables import HF_LAYER, MEGATRON_LAYER
from weightcast.bridges.rules import Rename, Rule

_ATTENTION, _HF_ATTENTION = f"{MEGATRON_LAYER}self_attention.", f"{HF_LAYER}self_attn."

# No norm is fused into the first linears of latent attention: there are two that read the same input.
_KEYS_AND_VALUES: tuple[Rule, ...] = (
    Rename(f"{MEGATRON_LAYER}input_layernorm.weight", f"{HF_LAYER}input_layernorm.weight"),
    Rename(f"{_ATTENTION}linear_kv_down_proj.weight", f"{_HF_ATTENTION}kv_a_proj_with_mqa.weight"),
    Rename(f"{_ATTENTION}linear_kv_up_proj.layer_norm_weight", f"{_HF_ATTENTION}kv_a_layernorm.weight"),
    Rename(f"{_ATTENTION}linear_kv_up_proj.weight", f"{_HF_ATTENTION}kv_b_proj.weight"),
    Rename(f"{_ATTENTION}linear_proj.weight", f"{_HF_ATTENTION}o_proj.weight"),
)
_WHOLE_QUERIES: tuple[Rule, ...] = (Rename(f"{_ATTENTION}linear_q_proj.weight", f"{_HF_ATTENTION}q_proj.weight"),)
_LATENT_QUERIES: tuple[Rule, ...] = (
    Rename(f"{_ATTENTION}linear_q_down_proj.weight", f"{_HF_ATTENTION}q_a_proj.weight"),
    Rename(f"{_ATTENTION}linear_q_up_proj.layer_norm_weight", f"{_HF_ATTENTION}q_a_layernorm.weight"),
    Rename(f"{_ATTENTION}linear_q_up_proj.weight", f"{_HF_ATTENTION}q_b_proj.weight"),
)


def latent_attention(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """Attention and the norm before it; queries come from a latent of their own unless `q_lora_rank` is null."""
    return _KEYS_AND_VALUES + (_WHOLE_QUERIES if hf.q_lora_rank is None else _LATENT_QUERIES)
