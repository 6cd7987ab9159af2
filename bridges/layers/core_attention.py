"""Core attention on `torch.nn.functional.scaled_dot_product_attention`, for every machine without Transformer Engine.

Megatron's own unfused attention needs CUDA for its mask, materialises all scores, and has no head dimension of its
own for values. This one takes grouped queries, a causal or sliding window mask, a mask given by the caller, a softmax
scale, and separate key and value head dimensions (`k_channels`, `v_channels`, as multi-latent attention asks). Capped
scores (Gemma 2) and attention sinks (gpt-oss) are computed one by one in `explicit_attention`.
"""

from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import nn

from weightcast.bridges.layers.context_parallel import gather_sequence, positions_of_all, positions_of_rank
from weightcast.bridges.layers.explicit_attention import explicit_attention
from weightcast.sync.errors import ConfigError

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def allowed_positions(
    num_queries: int, num_keys: int, window: tuple[int, int] | None, causal: bool, device: torch.device
) -> torch.Tensor:
    """Which keys each query may see: bool [num_queries, num_keys], True to see.

    Queries are the last `num_queries` of the `num_keys` positions. `window` is Megatron's (left, right): a query at i
    sees keys from i - left to i + right; -1 is no limit.
    """
    keys = torch.arange(num_keys, device=device)
    return allowed_pairs(keys[num_keys - num_queries :], keys, window, causal)


def allowed_pairs(
    query_at: torch.Tensor, key_at: torch.Tensor, window: tuple[int, int] | None, causal: bool
) -> torch.Tensor:
    """`allowed_positions` for queries and keys at any positions of a sequence, in any order."""
    query, key = query_at[:, None], key_at[None, :]
    allowed = torch.ones(len(query_at), len(key_at), dtype=torch.bool, device=query_at.device)
    if causal:
        allowed &= key <= query
    if window is not None:
        left, right = window
        if left >= 0:
            allowed &= key >= query - left
        if right >= 0:
            allowed &= key <= query + right
    return allowed


class SdpaAttention(MegatronModule):  # type: ignore[misc]
    """Attention of this rank's query heads over its query groups; with `softmax_type` learnable, a sink for each head.

    The layer's window is `config.window_size` where `config.window_attn_skip_freq` says so; scores are capped by a
    provider's `attn_logit_softcapping`. Under context parallelism keys and values are gathered over its ranks, and
    nothing else is ever communicated. Raises `ConfigError` for another softmax.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_what_it_cannot(config)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: tuple[int, int] | None = tuple(config.window_size) if windowed else None
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        self.attn_mask_type = attn_mask_type
        self.context_group: Any = None
        if config.context_parallel_size > 1:
            shared = getattr(pg_collection, "cp", None)
            self.context_group = shared if shared is not None else parallel_state.get_context_parallel_group()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        key_channels = k_channels if k_channels is not None else config.kv_channels
        # Megatron's query-key layer scaling divides here and multiplies again before the softmax, for the range of
        # fp16; torch's kernels accumulate in fp32, so there is nothing to do for it.
        self.softmax_scale = softmax_scale if softmax_scale is not None else key_channels**-0.5
        # Under Megatron's own name, in its unfused attention and in Transformer Engine's.
        self.softmax_offset: nn.Parameter | None = None
        if config.softmax_type == "learnable":
            shared = getattr(pg_collection, "tp", None)
            self.tensor_group = shared if shared is not None else parallel_state.get_tensor_model_parallel_group()
            heads = config.num_attention_heads // self.tensor_group.size()
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
            if config.perform_initialization:
                config.init_method(self.softmax_offset)

    @property
    def _is_explicit(self) -> bool:
        """Whether scores are computed one by one."""
        return self.softcap is not None or self.softmax_offset is not None

    def _mask(
        self, query: torch.Tensor, key: torch.Tensor, given: torch.Tensor | None, mask_type: AttnMaskType
    ) -> torch.Tensor | None:
        """The mask to pass on (True to see), or None where the kernel's plain causal or full attention says it all."""
        causal = mask_type in _CAUSAL
        if self.context_group is not None:
            return self._context_mask(query, given, causal)
        square = query.shape[0] == key.shape[0]
        if given is None and self.window is None and (not causal or (square and not self._is_explicit)):
            return None
        mask = allowed_positions(query.shape[0], key.shape[0], self.window, causal, query.device)
        return mask if given is None else mask & ~given  # Megatron's masks are True where nothing is seen

    def _context_mask(self, query: torch.Tensor, given: torch.Tensor | None, causal: bool) -> torch.Tensor:
        """The mask of this rank's queries over the gathered keys; `given` has whole rows, in the sequence's order."""
        num_here, size = query.shape[0], self.context_group.size()
        key_at = positions_of_all(num_here, size, query.device)
        query_at = positions_of_rank(num_here, self.context_group.rank(), size, query.device)
        mask = allowed_pairs(query_at, key_at, self.window, causal)
        return mask if given is None else mask & ~given[..., key_at]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Query [s, batch, heads, k], key [t, batch, groups, k], value [t, batch, groups, v] to [s, batch, heads * v].

        With `packed_seq_params` (format thd) the tensors have no batch dimension, and each of the sequences that stand
        end to end in them sees itself alone; gives [s, 1, heads * v] then.
        `attention_mask` is bool, broadcastable to [batch, 1, s, t], True where a query must not see a key; it is
        applied on top of the causal mask and the window. Under context parallelism all tensors are of this rank's
        tokens, the mask's t is that of the whole sequence, and the call is a collective.
        """
        if attention_bias is not None:
            raise ConfigError(
                "attention bias is not supported without Transformer Engine; pass an attention mask instead, or "
                "install transformer-engine"
            )
        mask_type = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        if packed_seq_params is not None:
            lengths = self._lengths_of_packed(packed_seq_params, len(query), attention_mask)
            pieces = [torch.split(part[:, None], lengths) for part in (query, key, value)]
            return torch.cat([self._attend(q, k, v, None, mask_type) for q, k, v in zip(*pieces, strict=True)])
        if self.context_group is not None:
            _refuse_cached_keys(len(query), len(key))
            key, value = gather_sequence(key, self.context_group), gather_sequence(value, self.context_group)
        return self._attend(query, key, value, attention_mask, mask_type)

    def _lengths_of_packed(
        self, packed: PackedSeqParams, num_tokens: int, attention_mask: torch.Tensor | None
    ) -> list[int]:
        """Tokens of each of the packed sequences."""
        bounds = packed.cu_seqlens_q.tolist()
        padded = (packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded)
        plain = all(part is None or part.tolist() == bounds for part in (packed.cu_seqlens_kv, *padded))
        if self.context_group is not None or attention_mask is not None or packed.qkv_format != "thd" or not plain:
            raise ConfigError(
                "without Transformer Engine packed sequences are of the format thd, without context parallelism, a "
                "mask or padding between them: drop these, or install transformer-engine"
            )
        if bounds[0] != 0 or bounds[-1] != num_tokens:
            raise ConfigError(f"cu_seqlens_q goes from {bounds[0]} to {bounds[-1]}, and there are {num_tokens} tokens")
        return [end - start for start, end in pairwise(bounds)]

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        mask_type: AttnMaskType,
    ) -> torch.Tensor:
        """Attention of one batch of sequences; shapes as in `forward`."""
        mask = self._mask(query, key, attention_mask, mask_type)
        dropout = self.dropout if self.training else 0.0
        if mask is not None and query.is_cuda and not self._is_explicit:
            # With a mask CUDA has an efficient kernel only for as many key heads as query heads; see the notes on
            # `enable_gqa` in torch's documentation of scaled_dot_product_attention.
            heads_per_group = query.shape[2] // key.shape[2]
            key, value = key.repeat_interleave(heads_per_group, 2), value.repeat_interleave(heads_per_group, 2)

        def attend() -> torch.Tensor:
            q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
            if self._is_explicit:
                cap, sinks = self.softcap, self.softmax_offset
                return explicit_attention(q, k, v, mask, self.softmax_scale, cap=cap, sinks=sinks, dropout_p=dropout)
            return nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and mask_type in _CAUSAL,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )

        if dropout > 0.0:
            # Heads are split over the tensor parallel ranks, so each must draw its own values.
            with get_cuda_rng_tracker().fork():
                context = attend()
        else:
            context = attend()
        return context.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks of this rank's heads, where there are any."""
        if self.softmax_offset is None:
            return {}
        entries: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return entries


def _refuse_cached_keys(num_queries: int, num_keys: int) -> None:
    if num_queries != num_keys:
        raise ConfigError(
            f"{num_queries} queries over {num_keys} cached keys: without Transformer Engine there is no generation "
            "under context parallelism; set context_parallel_size=1"
        )


def _refuse_what_it_cannot(config: TransformerConfig) -> None:
    if config.softmax_type not in ("vanilla", "learnable"):
        raise ConfigError(
            f"softmax_type={config.softmax_type!r} needs Transformer Engine; use 'vanilla' or, with sinks, 'learnable'"
        )
