"""Rotary position embeddings with the frequencies of the HF model, exactly.

Megatron's `RotaryEmbedding` hard-codes three of Llama 3's four scaling numbers (1, 4, 8192) and knows one base for all
layers. Here the frequencies come from a `Rope` record with every number in it, YaRN's and LongRoPE's too, and a model
whose sliding layers have a base of their own (Gemma 3) gets one table for each kind of layer, from which
`RopePerLayerAttention` picks. All are computed in the order of operations of transformers' `modeling_rope_utils`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention

Scaling = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): slow rotations interpolated, fast ones kept, a ramp between; the names are HF's."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """What cosines and sines are multiplied with."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Round the ends of the ramp to whole dimensions."""


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): a divisor for each rotated pair, and others past the original context length."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float
    """What cosines and sines are multiplied with."""


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
    extension: Yarn | LongRope | None = None
    """Replaces `scaling`, which is then "default"."""

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied with."""
        return 1.0 if self.extension is None else self.extension.attention_factor


def inverse_frequencies(rope: Rope, head_dim: int, num_positions: int = 1) -> torch.Tensor:
    """Radians a position for each rotated pair, fp32 [rotated dims / 2], in sequences of `num_positions`."""
    dim = int(head_dim * rope.percent)
    if isinstance(rope.extension, Yarn):
        return _scale_as_yarn(rope.extension, rope.base, dim)
    if isinstance(rope.extension, LongRope):
        return _scale_as_longrope(rope.extension, rope.base, dim, num_positions)
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


def _scale_as_yarn(yarn: Yarn, base: float, dim: int) -> torch.Tensor:
    def ramp_end(num_rotations: float) -> float:
        """The dimension that turns `num_rotations` times in the original context."""
        turns = yarn.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return (dim * math.log(turns)) / (2 * math.log(base))

    low, high = ramp_end(yarn.beta_fast), ramp_end(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    kept = 1 - ramp
    slowness = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    return 1.0 / (yarn.factor * slowness) * (1 - kept) + 1.0 / slowness * kept


def _scale_as_longrope(rope: LongRope, base: float, dim: int, num_positions: int) -> torch.Tensor:
    longer = num_positions > rope.original_max_position_embeddings
    divisors = torch.tensor(rope.long_factor if longer else rope.short_factor, dtype=torch.float32, device="cpu")
    return 1.0 / (divisors * base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))


def tell_attention_factor(config: TransformerConfig, factor: float) -> None:
    """Make Megatron multiply cosines and sines by `factor`.

    Its attention reads the factor from three attributes of its config, where there are any, as
    (0.1 * mscale * log(scaling) + 1) / (0.1 * mscale_all_dim * log(scaling) + 1); see
    `_yarn_get_concentration_factor_from_config` in megatron/core/models/common/embeddings.
    """
    config.yarn_rotary_scaling_factor = math.exp(10.0)
    config.yarn_mscale, config.yarn_mscale_all_dim = factor - 1.0, 0.0
    if factor != 1.0:
        config.apply_rope_fusion = False  # Transformer Engine's kernel has no such factor


def forget_tables() -> None:
    """Empty Megatron's caches of tables: the process's, they keep every model that asked, and its groups, alive."""
    for kind in (RotaryEmbedding, YarnRotaryEmbedding):
        kind.forward.cache_clear()


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
        self.rope, self.head_dim = rope, head_dim
        self.inv_freq = inverse_frequencies(rope, head_dim)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles [max_seq_len, rotated dims / 2]; LongRoPE has other frequencies for long sequences."""
        device = self.inv_freq.device
        frequencies = inverse_frequencies(self.rope, self.head_dim, offset + max_seq_len).to(device)
        return torch.outer(torch.arange(max_seq_len, device=device, dtype=torch.float32) + offset, frequencies)


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
