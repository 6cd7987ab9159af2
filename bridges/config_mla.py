"""From an HF configuration to a provider's fields of multi-head latent attention and its rope.

Latent attention has a rope of its own in Megatron, with YaRN's numbers under the plain names (`mscale`, ...) and
defaults that suit one model; every one of them is therefore set here, also for a plain rope. What Megatron's latent
attention would compute differently is refused by `UnsupportedModel`.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from weightcast.bridges.config import Fields, decoder_fields, refuse, require_absent, rope_parameters

# What DeepseekV2RMSNorm and DeepseekV3RMSNorm take for the latents, whatever `rms_norm_eps` is.
_LATENT_EPSILON = 1e-6

_YARN_FIELDS = frozenset(
    {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    }
)
_WITHOUT_EFFECT = frozenset({"rope_type", "type", "rope_theta", "max_position_embeddings"})


def latent_attention_fields(hf: PretrainedConfig) -> Fields:
    """Sizes and norms of a decoder with latent attention; everything that `decoder_fields` gives, and its rope."""
    heads, groups = hf.num_attention_heads, hf.num_key_value_heads
    if groups not in (None, heads):
        why = "every head has its own keys and values in latent attention"
        refuse(hf, "num_key_value_heads", groups, why, f"set it to num_attention_heads={heads}")
    require_absent(hf, "attention_bias", "Megatron's latent attention has no biases", (None, False))
    require_absent(hf, "rope_interleave", "Megatron rotates neighbouring pairs in latent attention", (None, True))
    return (
        decoder_fields(hf)
        | latent_rope_fields(hf, rope_parameters(hf))
        | {
            "kv_channels": hf.qk_nope_head_dim + hf.qk_rope_head_dim,
            "q_lora_rank": hf.q_lora_rank,
            "kv_lora_rank": hf.kv_lora_rank,
            "qk_head_dim": hf.qk_nope_head_dim,
            "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
            "v_head_dim": hf.v_head_dim,
            "qk_layernorm": True,
            "latent_layernorm_epsilon": _LATENT_EPSILON,
        }
    )


def latent_rope_fields(hf: PretrainedConfig, parameters: Mapping[str, Any]) -> Fields:
    """The rope's fields: plain or YaRN. Refuses every other type, and numbers that Megatron does not take."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ("default", "yarn"):
        refuse(hf, "rope_parameters.rope_type", kind, "latent attention has a plain rope or YaRN", "use one of them")
    _refuse_rest(hf, parameters, _YARN_FIELDS)
    if kind == "default":
        # Factors of 1 leave the softmax and the rotation alone: Megatron multiplies them in for plain rope as well.
        fields: Fields = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    else:
        fields = _yarn_fields(hf, parameters)
    return fields | {"rotary_base": float(parameters["rope_theta"]), "rotary_percent": 1.0}


def _refuse_rest(hf: PretrainedConfig, parameters: Mapping[str, Any], known: frozenset[str]) -> None:
    harmless = {"partial_rotary_factor": 1.0, "truncate": True, "attention_factor": None}
    for name in sorted(parameters.keys() - known - _WITHOUT_EFFECT):
        value = parameters[name]
        if value is not None and (name not in harmless or value != harmless[name]):
            refuse(hf, f"rope_parameters.{name}", value, "Megatron's latent attention has no such number", "remove it")


def _yarn_fields(hf: PretrainedConfig, parameters: Mapping[str, Any]) -> Fields:
    original = parameters.get("original_max_position_embeddings")
    if original is None:
        name = "rope_parameters.original_max_position_embeddings"
        refuse(hf, name, None, "rope type yarn needs it", "set it in the configuration")
    factor, mscale_all_dim = parameters.get("factor"), parameters.get("mscale_all_dim") or 0.0
    if factor is None:
        refuse(hf, "rope_parameters.factor", None, "rope type yarn needs it", "set it in the configuration")
    mscale = parameters.get("mscale") or 0.0
    if mscale_all_dim and not mscale:
        # transformers then scales the rotation as if neither were there, and the softmax as if both were.
        why = "Megatron takes mscale_all_dim together with mscale"
        refuse(hf, "rope_parameters.mscale_all_dim", mscale_all_dim, why, "set both, or remove it")
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(factor),
        "original_max_position_embeddings": int(original),
        # transformers takes zeros for absent numbers.
        "beta_fast": float(parameters.get("beta_fast") or 32.0),
        "beta_slow": float(parameters.get("beta_slow") or 1.0),
        "mscale": float(mscale) if mscale_all_dim else 1.0,
        "mscale_all_dim": float(mscale_all_dim),
    }
