"""Rules for HF checkpoints that store query, key and value (or gate and up) in one tensor, one after the other.

A concatenated gate and up needs no rule of its own: Megatron's global `linear_fc1.weight` has the same rows in the
same order, and a `Rename` says it all. Query, key and value are interleaved by query group in Megatron.

    ConcatQkv(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        "model.layers.{layer}.self_attn.qkv_proj.weight",
    )
"""

from dataclasses import dataclass, replace
from typing import Self

from weightcast.bridges.rules import LAYER, FusedQkv, ModelDimensions, Segment


@dataclass(frozen=True, slots=True)
class ConcatQkv:
    """All query rows, then all key rows, then all value rows in one HF tensor (weight or bias), as Phi-3 has them."""

    megatron: str
    hf: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def segments(self, shape: tuple[int, ...], dimensions: ModelDimensions) -> tuple[Segment, ...]:
        """As of `FusedQkv`, with all three in one tensor. Raises `UnmappedTensor` when the shape does not fit."""
        query_rows = dimensions.num_attention_heads * dimensions.head_dim
        key_rows = dimensions.num_query_groups * dimensions.head_dim
        first_row = {"q": 0, "k": query_rows, "v": query_rows + key_rows}
        apart = FusedQkv(self.megatron, q="q", k="k", v="v").segments(shape, dimensions)
        return tuple(replace(segment, hf=self.hf, hf_row=first_row[segment.hf] + segment.hf_row) for segment in apart)

    def at_layer(self, layer: int) -> Self:
        """The same rule with `{layer}` filled in."""
        number = str(layer)
        return replace(self, megatron=self.megatron.replace(LAYER, number), hf=self.hf.replace(LAYER, number))
