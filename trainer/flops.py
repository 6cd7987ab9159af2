"""Floating-point operations of training on one sample, from the model's sizes. Pure.

Counted as Megatron-LM does (`num_floating_point_operations` in its training.py; Narayanan et al. 2021, appendix A):
matrix products alone, a multiply-add is two, the backward costs twice the forward, recomputation does not count, and a
causal query sees half of the sequence on average. So TFLOP/s of two runs of a model compare whatever their settings.

Per token and layer, with h hidden size, n heads, g key-value groups, d head size, f feed-forward size, c keys seen on
average, the multiply-adds of the forward are

    attention    h n d  (query)  + 2 h g d  (key, value)  + n d h  (output)  + 2 n d c  (scores, values)
    latent       h r_q + r_q n (d + d_r)  (query; h n (d + d_r) without r_q)  + h (r_kv + d_r)  + r_kv n (d + d_v)
                 + n d_v h  + n (d + d_r + d_v) c        (DeepSeek-V2, section 2.1)
    MLP          3 h f  (gated; 2 h f otherwise)
    experts      h E  (router)  + top-k * 3 h f_e  + 3 h f_s  (shared)  + h  (its gate)

and h V once for the logits. A vision encoder is left out.

    flops_of_sample(provider, seq_length=4096)
"""

from typing import Any


def flops_of_sample(provider: Any, seq_length: int) -> float:
    """Operations of the forward and the backward of one sample of `seq_length` tokens."""
    layers = sum(
        _attention(provider, _keys_seen(provider, layer, seq_length)) + _feed_forward(provider, layer)
        for layer in range(provider.num_layers)
    )
    logits = provider.hidden_size * provider.vocab_size
    predicted = (provider.mtp_num_layers or 0) * (
        _attention(provider, seq_length / 2)
        + _feed_forward(provider, provider.num_layers - 1)
        + 2 * provider.hidden_size**2
        + logits
    )
    forward = 2 * (layers + logits + predicted) * seq_length
    return float(3 * forward)


def _keys_seen(provider: Any, layer: int, seq_length: int) -> float:
    """Keys that a query of the layer sees on average: half of the sequence, or less with a sliding window."""
    window = provider.window_size
    skip = getattr(provider, "window_attn_skip_freq", None)
    is_full = window is None or (skip is not None and _is_full_attention(skip, layer))
    if is_full:
        return seq_length / 2
    width = min(window[0] + 1, seq_length)
    return float(width - width**2 / (2 * seq_length))


def _is_full_attention(skip: int | list[int], layer: int) -> bool:
    """As Megatron reads `window_attn_skip_freq`: every n-th layer, or a 1 for each layer with a window."""
    if isinstance(skip, int):
        return (layer + 1) % skip == 0
    return not skip[layer]


def _attention(provider: Any, keys_seen: float) -> float:
    hidden, heads = provider.hidden_size, provider.num_attention_heads
    if provider.multi_latent_attention:
        return _latent_attention(provider, keys_seen)
    groups = provider.num_query_groups if provider.num_query_groups is not None else heads
    size = provider.kv_channels if provider.kv_channels is not None else hidden // heads
    return float(2 * hidden * heads * size + 2 * hidden * groups * size + 2 * heads * size * keys_seen)


def _latent_attention(provider: Any, keys_seen: float) -> float:
    hidden, heads = provider.hidden_size, provider.num_attention_heads
    query_size = provider.qk_head_dim + provider.qk_pos_emb_head_dim
    if provider.q_lora_rank is None:
        query = hidden * heads * query_size
    else:
        query = hidden * provider.q_lora_rank + provider.q_lora_rank * heads * query_size
    down = hidden * (provider.kv_lora_rank + provider.qk_pos_emb_head_dim)
    up = provider.kv_lora_rank * heads * (provider.qk_head_dim + provider.v_head_dim)
    output = heads * provider.v_head_dim * hidden
    return float(query + down + up + output + heads * (query_size + provider.v_head_dim) * keys_seen)


def _feed_forward(provider: Any, layer: int) -> float:
    hidden, matrices = provider.hidden_size, 3 if provider.gated_linear_unit else 2
    if not _has_experts(provider, layer):
        return float(matrices * hidden * provider.ffn_hidden_size)
    expert = provider.moe_ffn_hidden_size if provider.moe_ffn_hidden_size is not None else provider.ffn_hidden_size
    shared = provider.moe_shared_expert_intermediate_size or 0
    gate = hidden if shared and provider.moe_shared_expert_gate else 0
    return float(
        gate + hidden * provider.num_moe_experts + matrices * hidden * (provider.moe_router_topk * expert + shared)
    )


def _has_experts(provider: Any, layer: int) -> bool:
    """As Megatron reads `moe_layer_freq`: every n-th layer from the first, or a 1 for each layer with experts."""
    if provider.num_moe_experts is None:
        return False
    frequency = provider.moe_layer_freq
    return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])
