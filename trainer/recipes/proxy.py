"""`proxy=true`: any recipe, small enough for a laptop, with its architecture and as much of its layout as fits.

The configuration keeps every field that says how the model computes; sizes are cut down, in proportion where they hang
together (heads and their groups, groups of experts, sections of a rope). Pure.

    cfg = shrink(load_recipe("deepseek_v3.pretrain"), world_size=4)
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer, ModelConfig

HEADS, GROUPS, HEAD_DIM, WIDE_HEAD_DIM = 4, 2, 16, 32
HIDDEN = HEADS * HEAD_DIM
# Upper bounds of fields by the names that configurations have for them.
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "vocab_size": 512,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
VISION_SIZES = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
CUTS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
NUM_LAYERS, NUM_EXPERTS, SEQ_LENGTH, TRAIN_ITERS, PEFT_DIM = 4, 8, 64, 10, 8


def shrink(config: ConfigContainer, world_size: int) -> ConfigContainer:
    """A copy of `config` that trains in seconds a step on `world_size` ranks of one machine.

    Raises `ConfigError` where the model is not the recipe's own.
    """
    if not isinstance(config.model, ModelConfig) or not config.model.hf_config:
        raise ConfigError(
            "proxy=true shrinks the model that a recipe carries (model.hf_config), and there is none: take a recipe, "
            "such as recipe=llama32_1b.pretrain, or leave proxy out"
        )
    config = copy.deepcopy(config)
    config.model.hf_path = ""
    config.model.hf_config = shrink_model(config.model.hf_config)
    _cut_layout(config.model, world_size)
    replicas = world_size // math.prod(getattr(config.model, name) for name in CUTS[:3])
    config.train.micro_batch_size = 1
    config.train.global_batch_size = 4 * replicas
    config.train.rampup_batch_size = config.train.train_samples = None
    config.train.train_iters = TRAIN_ITERS
    config.scheduler.lr_warmup_iters = config.scheduler.lr_warmup_samples = 0
    config.scheduler.lr_decay_iters = config.scheduler.lr_decay_samples = None
    config.dataset.seq_length = SEQ_LENGTH
    if config.peft.is_used:
        config.peft.dim = min(config.peft.dim, PEFT_DIM)
    return config


def shrink_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a small model of the same architecture."""
    fields = copy.deepcopy(dict(given))
    _shrink_attention(fields, given)
    _shrink_experts(fields, given)
    _cut(fields, SIZES)
    _shrink_tokens(fields)
    layers = min(given["num_hidden_layers"], NUM_LAYERS)
    fields["num_hidden_layers"] = layers
    if "max_window_layers" in fields:
        fields["max_window_layers"] = layers
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:layers]
    if "vision_config" in fields:
        _cut(fields["vision_config"], VISION_SIZES)
        fields["vision_config"] |= {"out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]}
    return fields


def _cut(fields: dict[str, Any], sizes: Mapping[str, int]) -> None:
    for name, most in sizes.items():
        if fields.get(name) is not None:
            fields[name] = min(fields[name], most)


def _shrink_attention(fields: dict[str, Any], given: Mapping[str, Any]) -> None:
    heads = given["num_attention_heads"]
    own_dim = given.get("head_dim")
    fields["num_attention_heads"] = HEADS
    fields["num_key_value_heads"] = HEADS if given.get("num_key_value_heads", heads) == heads else GROUPS
    size = HEAD_DIM
    if own_dim is not None:
        # A head that is no share of the hidden size stays one that is none.
        size = HEAD_DIM if own_dim * heads == given["hidden_size"] else WIDE_HEAD_DIM
        fields["head_dim"] = size
    for name in ("rope_scaling", "rope_parameters"):
        sections = (fields.get(name) or {}).get("mrope_section")
        if sections is not None:
            scaled = [size // 2 * section // sum(sections) for section in sections]
            scaled[-1] += size // 2 - sum(scaled)
            fields[name]["mrope_section"] = scaled


def _shrink_experts(fields: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Fewer experts; chosen ones and groups in the proportions that routers of groups depend on."""
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if given.get(name) is not None:
            fields[name] = min(given[name], NUM_EXPERTS)
    if "num_experts_per_tok" not in given:
        return
    if (given.get("n_group") or 1) > 1:
        fields |= {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    else:
        fields["num_experts_per_tok"] = min(given["num_experts_per_tok"], 2)


def _shrink_tokens(fields: dict[str, Any]) -> None:
    """Special tokens at the end of the small vocabulary, in their order."""
    tokens = {name: value for name, value in fields.items() if name.endswith("_token_id") and value is not None}
    for place, name in enumerate(sorted(tokens)):
        fields[name] = fields["vocab_size"] - 1 - place


def _cut_layout(model: ModelConfig, world_size: int) -> None:
    """At most two ranks of each kind, and as many kinds as `world_size` has room for, in this order."""
    sizes = dict.fromkeys(CUTS, 1)
    for name in CUTS:
        tried = sizes | {name: min(getattr(model, name), 2)}
        tensor, pipeline, context, expert = tried.values()
        experts = (1 if model.expert_tensor_parallel_size == 1 else tensor) * expert * pipeline
        if world_size % math.lcm(tensor * pipeline * context, experts) == 0:
            sizes = tried
    for name, size in sizes.items():
        setattr(model, name, size)
    tensor, pipeline, *_ = sizes.values()
    interleaved = model.virtual_pipeline_model_parallel_size is not None and pipeline > 1
    model.virtual_pipeline_model_parallel_size = 2 if interleaved else None
    model.sequence_parallel = model.sequence_parallel and tensor > 1
    model.pipeline_model_parallel_layout = None
    model.num_layers_in_first_pipeline_stage = model.num_layers_in_last_pipeline_stage = None
    model.account_for_embedding_in_pipeline_split = model.account_for_loss_in_pipeline_split = False
    if model.recompute_num_layers is not None:
        model.recompute_num_layers = 1
