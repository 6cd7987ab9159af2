"""The rows that rule tables of Llama-like decoders share, in the global keys of Megatron and the names of HF.

A family's table is a sum of these tuples and its own. Whether a row is there may depend on the configuration, because
a rule that matches nothing is an error.
"""

from transformers import PretrainedConfig

from weightcast.bridges.rules import FusedQkv, GatedMlp, Rename, Rule, Tied, Vocab

MEGATRON_LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = f"{MEGATRON_LAYER}self_attention.", f"{HF_LAYER}self_attn."
_MLP, _HF_MLP = f"{MEGATRON_LAYER}mlp.", f"{HF_LAYER}mlp."

EMBEDDING_AND_FINAL_NORM: tuple[Rule, ...] = (
    Vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Rename("decoder.final_layernorm.weight", "model.norm.weight"),
)

UNTIED_OUTPUT: tuple[Rule, ...] = (Vocab("output_layer.weight", "lm_head.weight"),)

TIED_OUTPUT: tuple[Rule, ...] = (Tied("output_layer.weight", "model.embed_tokens.weight", copy="lm_head.weight"),)


def output(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The output layer's row."""
    return TIED_OUTPUT if hf.tie_word_embeddings else UNTIED_OUTPUT


def _qkv(kind: str) -> FusedQkv:
    return FusedQkv(
        f"{_ATTENTION}linear_qkv.{kind}",
        q=f"{_HF_ATTENTION}q_proj.{kind}",
        k=f"{_HF_ATTENTION}k_proj.{kind}",
        v=f"{_HF_ATTENTION}v_proj.{kind}",
    )


def _gated(kind: str) -> GatedMlp:
    return GatedMlp(f"{_MLP}linear_fc1.{kind}", gate=f"{_HF_MLP}gate_proj.{kind}", up=f"{_HF_MLP}up_proj.{kind}")


ATTENTION: tuple[Rule, ...] = (
    _qkv("weight"),
    Rename(f"{_ATTENTION}linear_proj.weight", f"{_HF_ATTENTION}o_proj.weight"),
)
QKV_BIAS: tuple[Rule, ...] = (_qkv("bias"),)
ATTENTION_OUTPUT_BIAS: tuple[Rule, ...] = (Rename(f"{_ATTENTION}linear_proj.bias", f"{_HF_ATTENTION}o_proj.bias"),)
QK_NORMS: tuple[Rule, ...] = (
    Rename(f"{_ATTENTION}q_layernorm.weight", f"{_HF_ATTENTION}q_norm.weight"),
    Rename(f"{_ATTENTION}k_layernorm.weight", f"{_HF_ATTENTION}k_norm.weight"),
)

GATED_MLP: tuple[Rule, ...] = (
    _gated("weight"),
    Rename(f"{_MLP}linear_fc2.weight", f"{_HF_MLP}down_proj.weight"),
)
GATED_MLP_BIAS: tuple[Rule, ...] = (
    _gated("bias"),
    Rename(f"{_MLP}linear_fc2.bias", f"{_HF_MLP}down_proj.bias"),
)

# One norm before attention, one before the MLP. HF names the second after what comes before it.
PRE_NORMS: tuple[Rule, ...] = (
    Rename(f"{_ATTENTION}linear_qkv.layer_norm_weight", f"{HF_LAYER}input_layernorm.weight"),
    Rename(f"{_MLP}linear_fc1.layer_norm_weight", f"{HF_LAYER}post_attention_layernorm.weight"),
)
# Norms before and behind both (Gemma 2 and 3). The keys of those behind are of `layers.linears.with_post_norm`.
SANDWICH_NORMS: tuple[Rule, ...] = (
    Rename(f"{_ATTENTION}linear_qkv.layer_norm_weight", f"{HF_LAYER}input_layernorm.weight"),
    Rename(f"{_ATTENTION}linear_proj.post_layernorm.weight", f"{HF_LAYER}post_attention_layernorm.weight"),
    Rename(f"{_MLP}linear_fc1.layer_norm_weight", f"{HF_LAYER}pre_feedforward_layernorm.weight"),
    Rename(f"{_MLP}linear_fc2.post_layernorm.weight", f"{HF_LAYER}post_feedforward_layernorm.weight"),
)

DENSE_DECODER = EMBEDDING_AND_FINAL_NORM + ATTENTION + GATED_MLP + PRE_NORMS
