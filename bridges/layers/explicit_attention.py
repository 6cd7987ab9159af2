"""Attention computed score by score, for what no fused kernel of torch does: capped scores, attention sinks.

Gemma 2 squeezes scores into a range before the softmax. gpt-oss gives each head a learned score of its own, the sink,
that takes part in the softmax and adds nothing to the output, so that a head may look at nothing.
"""

import torch
from torch import nn


def explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention that holds all scores, in fp32 from the scale to the softmax.

    Query [batch, heads, s, k], key and value [batch, groups, t, k or v], `mask` bool [s, t] or broadcastable to
    [batch, heads, s, t], True to see; gives [batch, heads, s, v]. With `cap` the scores become
    cap * tanh(scores / cap); `sinks` [heads] are scores beside those of the keys.
    """
    heads_per_group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads_per_group, 1), value.repeat_interleave(heads_per_group, 1)
    scores = (query @ key.transpose(2, 3)).float()
    scores = scores * scale if cap is None else torch.tanh(scores * (scale / cap)) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        beside = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, beside], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return nn.functional.dropout(weights.to(query.dtype), dropout_p) @ value
