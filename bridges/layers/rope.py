"""Rotary position embeddings with the frequencies of the HF model, exactly.

Megatron's `RotaryEmbedding` hard-codes three of Llama 3's four scaling numbers (1, 4, 8192) and knows one base for all
layers. Here the frequencies come from a `Rope` record with every number in it, and a model whose sliding layers have
a base of their own (Gemma 3) gets one table for each kind of layer, from which `RopePerLayerAttention` picks.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention

Scaling = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class Rope:
    """What determines the rotation frequencies; the names are those of HF's `rope_parameters`."""

    base: float
    percent: float = 1.0
    """Share of the head dimension that is rotated."""
    scaling: Scaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians a position for each rotated pair, fp32 [rotated dims / 2].

    In the order of operations of transformers' `modeling_rope_utils`, so that logits agree to the last bits.
    """
    dim = int(head_dim * rope.percent)
    plain = 1.0 / (rope.base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _scale_as_llama3(plain, rope)
    return plain


def _scale_as_llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Slow rotations are divided by the factor, fast ones kept, those between the two wavelengths interpolated."""
    wavelength = 2 * math.pi / plain
    longest_kept = rope.original_max_position_embeddings / rope.high_freq_factor
    shortest_divided = rope.original_max_position_embeddings / rope.low_freq_factor
    smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    interpolated = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(wavelength > shortest_divided, plain / rope.factor, plain)
    between = (wavelength >= longest_kept) & (wavelength <= shortest_divided)
    return torch.where(between, interpolated, scaled)


class RopeEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Megatron's rotary embedding with the frequencies of a `Rope`; everything else (context parallelism) is kept."""

    def __init__(self, rope: Rope, head_dim: int, interleaved: bool = False, cp_group: Any = None) -> None:
        super().__init__(
            kv_channels=head_dim,
            rotary_percent=rope.percent,
            rotary_interleaved=interleaved,
            rotary_base=rope.base,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self.inv_freq = inverse_frequencies(rope, head_dim)


class RopePerKindOfLayer(RopeEmbedding):
    """Two tables stacked, [2, s, 1, 1, dim]: index 0 for layers with full attention, 1 for those with a window."""

    def __init__(self, rope: Rope, local: Rope, head_dim: int, interleaved: bool = False, cp_group: Any = None) -> None:
        super().__init__(rope, head_dim, interleaved, cp_group)
        self.local = RopeEmbedding(local, head_dim, interleaved, cp_group)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.stack([super().forward(*args, **kwargs), self.local(*args, **kwargs)])


class RopePerLayerAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention that picks its own table out of those of `RopePerKindOfLayer`."""

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any) -> Any:
        windowed = is_layer_window_attention(
            self.config.window_size, self.config.window_attn_skip_freq, self.layer_number
        )
        table = None if rotary_pos_emb is None else rotary_pos_emb[int(windowed)]
        return super().forward(*args, rotary_pos_emb=table, **kwargs)
