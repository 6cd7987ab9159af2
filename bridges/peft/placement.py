"""Placement: how a linear is cut over ranks, and what a low-rank detour around it has to send.

Of the two factors of an update B·A one is cut as the linear is and the other one is whole on every rank, so that only
the few values between them (`dim` a token) travel:

    column-parallel   A whole, B cut by rows       x ── A ── gather positions, or sum the gradient ── B
    row-parallel      A cut by columns, B whole    x ── A ── sum, or sum and scatter positions ────── B

Under sequence parallelism a whole factor has seen only its rank's positions; its gradient is marked for Megatron's
sum at the end of a step, as those of norms are. Experts under tensor parallelism leave sums of tokens to the token
dispatcher, so there it is the gradient of the whole factor that is summed at once.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import nn
from torch.nn.functional import linear as matmul

from weightcast.bridges.layers.sum_gradient import sum_gradient
from weightcast.sync.errors import UnsupportedModel

Cut = Literal["rows", "columns", "nothing"]
_CUTS: dict[str, Cut] = {
    "ColumnParallelLinear": "rows",
    "RowParallelLinear": "columns",
    "TEColumnParallelLinear": "rows",
    "TELayerNormColumnParallelLinear": "rows",
    "TERowParallelLinear": "columns",
    "TEColumnParallelGroupedLinear": "rows",
    "TERowParallelGroupedLinear": "columns",
    "TELinear": "nothing",  # last: the others derive from it
}


@dataclass(frozen=True)
class Placement:
    """How one linear is cut: its weight is [num_out, num_in] on this rank."""

    cut: Cut
    num_out: int
    num_in: int
    group: Any
    """The ranks among which it is cut."""
    size: int
    rank: int
    sequence_parallel: bool
    """The linear's uncut side (input of a column-parallel one) has this rank's positions only."""
    sums_left_out: bool
    """An expert's linear: sums over `group` are taken elsewhere."""

    @property
    def all_inputs(self) -> int:
        """Input features of the whole linear."""
        return self.num_in * (self.size if self.cut == "columns" else 1)

    def lower(self, x: torch.Tensor, factor_in: torch.Tensor) -> torch.Tensor:
        """A·x for inputs [s, b, num_in] as the linear gets them: [s, b, dim], as `lift` wants it."""
        if self.size == 1 or self.cut == "nothing":
            return matmul(x, factor_in)
        if self.sums_left_out:
            return matmul(x, sum_gradient(factor_in, self.group) if self.cut == "rows" else factor_in)
        low: torch.Tensor = matmul(x, factor_in)
        if self.cut == "rows":
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, group=self.group)  # type: ignore[no-any-return]
            return sum_gradient(low, self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.group)  # type: ignore[no-any-return]
        return reduce_from_tensor_model_parallel_region(low, group=self.group)  # type: ignore[no-any-return]

    def lift(self, low: torch.Tensor, factor_out: torch.Tensor) -> torch.Tensor:
        """B·low: what to add to the linear's output."""
        return matmul(low, self.whole(factor_out))

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W·x as the linear computes it, without its bias, for a frozen W."""
        if self.size == 1 or self.cut == "nothing":
            return matmul(x, weight)
        if self.cut == "columns":
            return self.lower(x, weight)
        if self.sums_left_out:
            return matmul(x, weight)
        if self.sequence_parallel:
            return matmul(gather_from_sequence_parallel_region(x, group=self.group), weight)
        return matmul(sum_gradient(x, self.group), weight)

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter of the output's side, with its gradient summed where nobody else would."""
        if self.sums_left_out and self.cut == "columns" and self.size > 1:
            return sum_gradient(parameter, self.group)
        return parameter

    def row_norms(self, weight: torch.Tensor) -> torch.Tensor:
        """The 2-norms of the whole linear's rows that are on this rank: [num_out]. A collective if columns are cut."""
        if self.cut != "columns" or self.size == 1:
            norms: torch.Tensor = torch.linalg.norm(weight, dim=1)
            return norms
        # In fp64, so that the norms do not depend on where the columns are cut.
        squares: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
        torch.distributed.all_reduce(squares, group=self.group)
        return squares.sqrt().to(weight.dtype)


def read_placement(linear: nn.Module, name: str) -> Placement:
    """The placement of one of Megatron's or Transformer Engine's parallel linears, by what they say of themselves.

    Of a grouped linear that of each expert, since all are cut alike. Raises `UnsupportedModel` for anything else.
    """
    weight = getattr(linear, "weight0" if hasattr(linear, "num_gemms") else "weight", None)
    if weight is None or weight.ndim != 2 or getattr(linear, "gather_output", False):
        raise UnsupportedModel(
            f"{name}, a {type(linear).__name__}, holds no weight of its own (or of each expert) or gathers its output; "
            "leave it out of target_modules, and moe_single_grouped_weight off"
        )
    cut = _find_cut(linear, name)
    group = getattr(linear, "tp_group", None) or getattr(linear, "_tp_group", None)
    size = get_pg_size(group) if cut != "nothing" else 1
    # Of Megatron's own linears, and of Transformer Engine's, which lose their mode of parallelism there.
    outside = getattr(linear, "explicit_expert_comm", False) or getattr(linear, "parallel_mode", "") is None
    outside = bool(outside) and cut != "nothing"
    split = bool(getattr(linear.config, "sequence_parallel", False)) and not outside
    return Placement(
        cut=cut,
        num_out=weight.shape[0],
        num_in=weight.shape[1],
        group=group,
        size=size,
        rank=get_pg_rank(group) if size > 1 else 0,
        sequence_parallel=split and (size > 1 or cut == "nothing"),
        sums_left_out=outside,
    )


def _find_cut(linear: nn.Module, name: str) -> Cut:
    """By the names of its classes, because Transformer Engine's cannot be imported everywhere."""
    for base in type(linear).__mro__:
        if base.__name__ in _CUTS:
            return _CUTS[base.__name__]
    raise UnsupportedModel(
        f"{name} is a {type(linear).__name__}; adapters go on {', '.join(_CUTS)}: leave it out of target_modules"
    )
