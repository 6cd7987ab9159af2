"""The rows that rule tables of Llama-like decoders share, in the global keys of Megatron and the names of HF.

A family's table is a sum of these tuples and its own. Whether a row is there may depend on the configuration, because
a rule that matches nothing is an error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PretrainedConfig

from weightcast.bridges.rules import FusedQkv, GatedMlp, Rename, Rule, Tied, Vocab
from weightcast.bridges.rules_experts import PerExpert

MEGATRON_LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = f"{MEGATRON_LAYER}self_attention.", f"{HF_LAYER}self_attn."
_MLP, _HF_MLP = f"{MEGATRON_LAYER}mlp.", f"{HF_LAYER}mlp."
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

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
ATTENTION_NORM: tuple[Rule, ...] = (
    Rename(f"{_ATTENTION}linear_qkv.layer_norm_weight", f"{HF_LAYER}input_layernorm.weight"),
)
DENSE_MLP_NORM: tuple[Rule, ...] = (
    Rename(f"{_MLP}linear_fc1.layer_norm_weight", f"{HF_LAYER}post_attention_layernorm.weight"),
)
PRE_NORMS = ATTENTION_NORM + DENSE_MLP_NORM
# Norms before and behind both (Gemma 2 and 3). The keys of those behind are of `layers.linears.with_post_norm`.
SANDWICH_NORMS: tuple[Rule, ...] = (
    Rename(f"{_ATTENTION}linear_qkv.layer_norm_weight", f"{HF_LAYER}input_layernorm.weight"),
    Rename(f"{_ATTENTION}linear_proj.post_layernorm.weight", f"{HF_LAYER}post_attention_layernorm.weight"),
    Rename(f"{_MLP}linear_fc1.layer_norm_weight", f"{HF_LAYER}pre_feedforward_layernorm.weight"),
    Rename(f"{_MLP}linear_fc2.post_layernorm.weight", f"{HF_LAYER}post_feedforward_layernorm.weight"),
)

DENSE_DECODER = EMBEDDING_AND_FINAL_NORM + ATTENTION + GATED_MLP + PRE_NORMS

# Layers with experts. The norm stands alone, because the router comes behind it.
PRE_MLP_NORM: tuple[Rule, ...] = (
    Rename(f"{MEGATRON_LAYER}pre_mlp_layernorm.weight", f"{HF_LAYER}post_attention_layernorm.weight"),
)
ROUTER: tuple[Rule, ...] = (Rename(f"{_MLP}router.weight", f"{_HF_MLP}gate.weight"),)
# A buffer, kept in fp32.
ROUTER_BIAS: tuple[Rule, ...] = (Rename(f"{_MLP}router.expert_bias", f"{_HF_MLP}gate.e_score_correction_bias"),)


def experts(num_experts: int, *, hf: str = _HF_MLP, names: tuple[str, str, str] = GATE_UP_DOWN) -> tuple[Rule, ...]:
    """The experts' rows; `hf` is what the names of experts start with, `names` are those of gate, up and down."""
    gate, up, down = (f"{hf}experts.{{expert}}.{name}.weight" for name in names)
    expert = f"{_MLP}experts.experts."
    return (
        PerExpert(GatedMlp(f"{expert}linear_fc1.weight", gate=gate, up=up), num_experts),
        PerExpert(Rename(f"{expert}linear_fc2.weight", down), num_experts),
    )


def shared_experts(hf_name: str = "shared_experts") -> tuple[Rule, ...]:
    """The rows of the experts that see every token, which HF calls `hf_name`."""
    shared, hf = f"{_MLP}shared_experts.", f"{_HF_MLP}{hf_name}."
    return (
        GatedMlp(f"{shared}linear_fc1.weight", gate=f"{hf}gate_proj.weight", up=f"{hf}up_proj.weight"),
        Rename(f"{shared}linear_fc2.weight", f"{hf}down_proj.weight"),
    )


def at_layers(rules: Iterable[Rule], layers: Iterable[int]) -> tuple[Rule, ...]:
    """`rules` at some layers only, for models whose layers differ."""
    rules = tuple(rules)
    return tuple(rule.at_layer(layer) for layer in layers for rule in rules)


def under(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """`rules` for a model that is a part of another one: `prefix` comes in front of its Megatron keys."""
    return tuple(replace(rule, megatron=prefix + rule.megatron) for rule in rules)  # type: ignore[type-var]


def mlp(has_experts: bool, sparse: Iterable[Rule]) -> tuple[Rule, ...]:
    """The MLP of a layer with the norm before it: `sparse` where it has experts, else a dense one."""
    return (*PRE_MLP_NORM, *sparse) if has_experts else DENSE_MLP_NORM + GATED_MLP


def dense_or_experts(has_experts: Sequence[bool], sparse: Iterable[Rule]) -> tuple[Rule, ...]:
    """The MLPs of all layers, as `mlp` gives them."""
    sparse, layers = tuple(sparse), range(len(has_experts))
    dense = at_layers(mlp(False, sparse), (layer for layer in layers if not has_experts[layer]))
    return dense + at_layers(mlp(True, sparse), (layer for layer in layers if has_experts[layer]))
