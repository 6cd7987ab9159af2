"""Adapted linears: Megatron's own modules with a low-rank update beside them.

An adapter becomes a child of the linear that it adapts, `linear_qkv.adapter`, and the linear gets a class derived from
its own. So every name in the model stays what it was (`linear_qkv.weight`), in state dicts and checkpoints of any
layout, and hooks behind the linear (a norm, a cap) see the adapted output.

    LoRA      W·x + s·B·A·x
    DoRA      m · (W·x + s·B·A·x) / norm(W + s·B·A), row by row; the norm gets no gradient

The derived class does no more than add these; freezing and choosing is `recipes.py`. A grouped linear of several
experts (`grouped.py`) does it for each of them.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.nn.functional import dropout

from weightcast.bridges.peft.factors import LowRank, SplitLowRank
from weightcast.bridges.peft.names import LINEAR_IN, LINEAR_OUT, MAGNITUDE
from weightcast.bridges.peft.placement import Placement


@dataclass
class Adaptation:
    """How one linear is adapted, and whether its weight holds the update already."""

    placement: Placement
    dropout: float
    dropout_position: str
    use_dora: bool
    gated: bool
    """All gate rows, then all up rows: the weight is cut in two halves over the ranks."""
    merged: bool = False
    base: torch.Tensor | None = None
    """The weight's own bits while it is merged, where they were kept."""


class AdaptedWeight(Protocol):
    """A weight with an adapter beside it: that of a linear, or that of one expert of a grouped linear."""

    @property
    def weight(self) -> nn.Parameter: ...

    @property
    def adapter(self) -> LowRank | SplitLowRank: ...

    @property
    def adaptation(self) -> Adaptation: ...

    @property
    def training(self) -> bool: ...


class Adapted(nn.Module):
    """What a linear's class is mixed with: `AdaptedLinear`, or `grouped.AdaptedGroupedLinear`."""

    def adapted_weights(self) -> Iterator[AdaptedWeight]:
        """Its weights, each with its adapter."""
        raise NotImplementedError


class AdaptedLinear(Adapted):
    """What `adapted_class` mixes into a linear's class."""

    weight: nn.Parameter
    adapter: LowRank | SplitLowRank
    adaptation: Adaptation

    def adapted_weights(self) -> Iterator[AdaptedWeight]:
        """The only one."""
        yield cast(AdaptedWeight, self)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias, seen = _unpack(super().forward(x, *args, **kwargs), x)
        (own,) = self.adapted_weights()
        return adapted_output(own, output, seen, None if bias is not None else self.own_bias()), bias

    def own_bias(self) -> torch.Tensor | None:
        """The bias that the linear adds itself."""
        bias = getattr(self, "bias", None)
        if not isinstance(bias, torch.Tensor) or not bias.numel() or getattr(self, "skip_bias_add", False):
            return None
        return bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The linear's own tensors, and the adapter's in their layout."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        inside = f"{prefix}adapter."
        kept = {key: entry for key, entry in own.items() if not key.startswith(inside)}
        (weight,) = self.adapted_weights()
        return kept | shard_adapter(weight, inside, sharded_offsets, metadata or {})


def adapted_class(linear: type[nn.Module]) -> type[nn.Module]:
    """The class of `linear` objects that have an `adapter` and an `adaptation`."""
    return type(f"Adapted{linear.__name__}", (AdaptedLinear, linear), {})


def adapted_weights(modules: Iterable[nn.Module]) -> Iterator[AdaptedWeight]:
    """The weights with adapters in `modules`, which are model chunks."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, Adapted):
                yield from part.adapted_weights()


def adapted_output(
    linear: AdaptedWeight, output: torch.Tensor, seen: torch.Tensor, added_bias: torch.Tensor | None
) -> torch.Tensor:
    """What the linear gives for `seen`, from what its own weight gave: `output`, which holds `added_bias` if any."""
    if linear.adaptation.merged:
        return output
    if linear.adaptation.use_dora:
        return _dora_output(linear, output, seen, added_bias)
    return output + _update_output(linear, _drop_inputs(linear, seen)).to(output.dtype)


def merged_weight(
    linear: AdaptedWeight, dtype: torch.dtype = torch.float32, norms: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight with its update, on this rank, computed in `dtype`.

    Without `norms`, those of `merged_norms`, it is a collective for DoRA on a row-parallel linear.
    """
    adaptation = linear.adaptation
    whole = linear.weight.detach().to(dtype) + linear.adapter.update(dtype).detach()
    if not adaptation.use_dora:
        return whole
    norms = adaptation.placement.row_norms(whole) if norms is None else norms
    return (linear.adapter.magnitude(norms).detach().to(dtype) / norms).view(-1, 1) * whole


def merged_norms(linear: AdaptedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """What DoRA divides the rows by, where ranks must sum for it: [num_out], a collective. None elsewhere."""
    placement = linear.adaptation.placement
    if not linear.adaptation.use_dora or placement.cut != "columns" or placement.size == 1:
        return None
    return placement.row_norms(linear.weight.detach().to(dtype) + linear.adapter.update(dtype).detach())


def _unpack(result: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Output, bias left to the caller, and what the weight has seen: behind Transformer Engine's fused norm, not `x`.

    Its linears give (output, bias), ((output, normed), None) or (output, bias, normed).
    """
    if len(result) == 3:
        return result[0], result[1], result[2]
    output, bias = result
    if isinstance(output, tuple):
        return output[0], bias, output[1]
    return output, bias, x


def _update_output(linear: AdaptedWeight, x: torch.Tensor) -> torch.Tensor:
    adaptation = linear.adaptation
    update: torch.Tensor = linear.adapter(x)
    if linear.training and adaptation.dropout and adaptation.dropout_position == "post":
        is_cut = adaptation.placement.cut == "rows" or adaptation.placement.sequence_parallel
        with _random_per_rank(adaptation.placement, is_cut):
            update = dropout(update, adaptation.dropout)
    return update


def _drop_inputs(linear: AdaptedWeight, x: torch.Tensor) -> torch.Tensor:
    adaptation = linear.adaptation
    if not linear.training or not adaptation.dropout or adaptation.dropout_position != "pre":
        return x
    is_cut = adaptation.placement.cut == "columns" or adaptation.placement.sequence_parallel
    with _random_per_rank(adaptation.placement, is_cut):
        return dropout(x, adaptation.dropout)


def _random_per_rank(placement: Placement, is_cut: bool) -> AbstractContextManager[Any]:
    """Ranks that hold the same values must drop the same of them, others not."""
    return get_cuda_rng_tracker().fork() if is_cut and placement.size > 1 else nullcontext()


def _dora_output(
    linear: AdaptedWeight, output: torch.Tensor, seen: torch.Tensor, added_bias: torch.Tensor | None
) -> torch.Tensor:
    """What `peft` computes: the base's own output comes from undropped inputs, its change from dropped ones."""
    adaptation = linear.adaptation
    with torch.no_grad():
        # The norm counts as a constant (section 4.3 of the DoRA paper).
        weight = linear.weight.detach()
        norms = adaptation.placement.row_norms(weight + linear.adapter.update(weight.dtype))
    scale = linear.adapter.magnitude(norms) / norms
    x = _drop_inputs(linear, seen)
    if x is seen:
        base = output if added_bias is None else output - added_bias
    else:
        base = adaptation.placement.project(x, weight)
    return output + ((scale - 1) * base + scale * _update_output(linear, x)).to(output.dtype)


def shard_adapter(
    linear: AdaptedWeight, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any]
) -> dict[str, Any]:
    """The adapter's tensors under `prefix`, cut as the weight is, as `sharded_state_dict` lists them."""
    adaptation = linear.adaptation
    placement = adaptation.placement
    cut = {"rows": {LINEAR_OUT: 0, MAGNITUDE: 0}, "columns": {LINEAR_IN: 1}, "nothing": {}}[placement.cut]
    result: dict[str, Any] = {}
    for name, pair in linear.adapter.pairs():
        result |= make_sharded_tensors_for_checkpoint(
            pair.state_dict(prefix="", keep_vars=True),
            f"{prefix}{name}",
            cut,
            sharded_offsets,
            tp_group=placement.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
    if adaptation.gated and isinstance(linear.adapter, LowRank):
        for tensor in (LINEAR_OUT, MAGNITUDE):
            if (key := f"{prefix}{tensor}") in result:
                result[key] = apply_swiglu_sharded_factory(
                    result[key], sharded_offsets, metadata.get("singleton_local_shards", False)
                )
    return result
