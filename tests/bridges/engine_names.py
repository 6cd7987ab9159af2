"""Transformer Engine's names: what a layer's `sharded_state_dict` lists with it, by reading Megatron-Core's source.

Its layers cannot be built here, so this is a table: key, global shape, and the axis that tensor parallelism cuts. It
follows `get_gpt_layer_with_transformer_engine_spec` (models/gpt/gpt_layer_specs.py), the classes of
extensions/transformer_engine.py (a norm is `layer_norm_weight` of the linear behind it), `TEGroupedMLP`
(transformer/moe/experts.py: all experts of a layer under the key of one) and transformer/multi_token_prediction.py.

    for tensor in engine_tensors(provider):
        print(tensor.key, tensor.shape, tensor.axis)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weightcast.bridges.layers.moe import expert_layers
from weightcast.bridges.layers.mtp import INNER_LAYER
from weightcast.bridges.provider import GPTModelProvider


@dataclass(frozen=True)
class EngineTensor:
    """A global tensor of a model with Transformer Engine's layers."""

    key: str
    shape: tuple[int, ...]
    axis: int | None = None
    """Cut by tensor parallelism along it; None is copied to all ranks."""
    halves: bool = False
    """Gate and up are cut each on its own, and a rank has a part of both."""
    experts: bool = False
    """The first axis is that of the experts."""


def engine_tensors(provider: GPTModelProvider) -> list[EngineTensor]:
    """Every tensor of the model, in no order."""
    hidden, rows = provider.hidden_size, provider.padded_vocab_size
    assert rows is not None
    tensors = [EngineTensor("embedding.word_embeddings.weight", (rows, hidden), 0)]
    tensors.append(EngineTensor("decoder.final_layernorm.weight", (hidden,)))
    if not provider.share_embeddings_and_output_weights:
        tensors.append(EngineTensor("output_layer.weight", (rows, hidden), 0))
    pattern = expert_layers(provider)
    for layer, has_experts in enumerate(pattern):
        tensors += _layer(provider, f"decoder.layers.{layer}.", has_experts)
    for number in range(provider.mtp_num_layers or 0):
        prefix = f"mtp.layers.{number}."
        tensors += [EngineTensor(f"{prefix}{norm}.weight", (hidden,)) for norm in ("enorm", "hnorm", "final_layernorm")]
        tensors.append(EngineTensor(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), 0))
        tensors += _layer(provider, f"{prefix}{INNER_LAYER}.", pattern[-1])
    return tensors


def _layer(provider: GPTModelProvider, prefix: str, has_experts: bool) -> list[EngineTensor]:
    attention = _latent_attention if provider.multi_latent_attention else _attention
    mlp = _experts(provider, prefix) if has_experts else _dense(provider, f"{prefix}mlp.")
    return [*attention(provider, prefix), *mlp]


def _attention(provider: GPTModelProvider, prefix: str) -> Iterator[EngineTensor]:
    hidden, size, name = provider.hidden_size, provider.kv_channels, f"{prefix}self_attention."
    assert size is not None and provider.num_query_groups is not None
    queries = provider.num_attention_heads * size
    rows = queries + 2 * provider.num_query_groups * size
    yield EngineTensor(f"{name}linear_qkv.layer_norm_weight", (hidden,))
    yield EngineTensor(f"{name}linear_qkv.weight", (rows, hidden), 0)
    if provider.qkv_bias:
        yield EngineTensor(f"{name}linear_qkv.bias", (rows,), 0)
    yield EngineTensor(f"{name}linear_proj.weight", (hidden, queries), 1)
    if provider.attention_output_bias:
        yield EngineTensor(f"{name}linear_proj.bias", (hidden,))
    if provider.softmax_type == "learnable":
        yield EngineTensor(f"{name}core_attention.softmax_offset", (provider.num_attention_heads,), 0)
    if provider.qk_layernorm:
        yield EngineTensor(f"{name}q_layernorm.weight", (size,))
        yield EngineTensor(f"{name}k_layernorm.weight", (size,))
    if provider.post_norms:
        yield EngineTensor(f"{name}linear_proj.post_layernorm.weight", (hidden,))


def _latent_attention(provider: Any, prefix: str) -> Iterator[EngineTensor]:
    """The first linears of the latents are copied to all ranks; without Transformer Engine they are cut."""
    hidden, heads, name = provider.hidden_size, provider.num_attention_heads, f"{prefix}self_attention."
    latent, rotated = provider.kv_lora_rank, provider.qk_pos_emb_head_dim
    queries = heads * (provider.qk_head_dim + rotated)
    yield EngineTensor(f"{prefix}input_layernorm.weight", (hidden,))
    if provider.q_lora_rank is None:
        yield EngineTensor(f"{name}linear_q_proj.weight", (queries, hidden), 0)
    else:
        yield EngineTensor(f"{name}linear_q_down_proj.weight", (provider.q_lora_rank, hidden))
        yield EngineTensor(f"{name}linear_q_up_proj.layer_norm_weight", (provider.q_lora_rank,))
        yield EngineTensor(f"{name}linear_q_up_proj.weight", (queries, provider.q_lora_rank), 0)
    yield EngineTensor(f"{name}linear_kv_down_proj.weight", (latent + rotated, hidden))
    yield EngineTensor(f"{name}linear_kv_up_proj.layer_norm_weight", (latent,))
    yield EngineTensor(
        f"{name}linear_kv_up_proj.weight", (heads * (provider.qk_head_dim + provider.v_head_dim), latent), 0
    )
    yield EngineTensor(f"{name}linear_proj.weight", (hidden, heads * provider.v_head_dim), 1)


def _dense(provider: GPTModelProvider, name: str) -> Iterator[EngineTensor]:
    hidden, size = provider.hidden_size, provider.ffn_hidden_size
    assert size is not None
    yield EngineTensor(f"{name}linear_fc1.layer_norm_weight", (hidden,))
    yield EngineTensor(f"{name}linear_fc1.weight", (2 * size, hidden), 0, halves=True)
    yield EngineTensor(f"{name}linear_fc2.weight", (hidden, size), 1)
    if provider.mlp_bias:
        yield EngineTensor(f"{name}linear_fc1.bias", (2 * size,), 0, halves=True)
        yield EngineTensor(f"{name}linear_fc2.bias", (hidden,))
    if provider.post_norms:
        yield EngineTensor(f"{name}linear_fc2.post_layernorm.weight", (hidden,))


def _experts(provider: GPTModelProvider, prefix: str) -> Iterator[EngineTensor]:
    hidden, number, size = provider.hidden_size, provider.num_moe_experts, provider.moe_ffn_hidden_size
    shared, name = provider.moe_shared_expert_intermediate_size, f"{prefix}mlp."
    assert number is not None and size is not None
    yield EngineTensor(f"{prefix}pre_mlp_layernorm.weight", (hidden,))
    yield EngineTensor(f"{name}router.weight", (number, hidden))
    if provider.moe_router_enable_expert_bias:
        yield EngineTensor(f"{name}router.expert_bias", (number,))
    experts = f"{name}experts.experts."
    yield EngineTensor(f"{experts}linear_fc1.weight", (number, 2 * size, hidden), 1, halves=True, experts=True)
    yield EngineTensor(f"{experts}linear_fc2.weight", (number, hidden, size), 2, experts=True)
    if provider.moe_bias:
        yield EngineTensor(f"{name}router.bias", (number,))
        yield EngineTensor(f"{experts}linear_fc1.bias", (number, 2 * size), 1, halves=True, experts=True)
        yield EngineTensor(f"{experts}linear_fc2.bias", (number, hidden), experts=True)
    if shared is not None:
        yield EngineTensor(f"{name}shared_experts.linear_fc1.weight", (2 * shared, hidden), 0, halves=True)
        yield EngineTensor(f"{name}shared_experts.linear_fc2.weight", (hidden, shared), 1)
        if provider.moe_shared_expert_gate:
            yield EngineTensor(f"{name}shared_experts.gate_weight", (1, hidden))
