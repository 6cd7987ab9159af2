"""Factors: the low-rank modules beside a linear, in the layout of its weight, under the trainer's names.

`LowRank` is one pair A (`linear_in`), B (`linear_out`) with, for DoRA, the `weight_magnitude` of each row.
`SplitLowRank` holds one for each part of a fused linear (`adapter_q`, ...), whose rows Megatron interleaves by query
group; where they lie is read from the same rule that maps the fused weight.

Both answer the same four questions in the order of the linear's own rows on this rank, so that layers, merging and
DoRA do not care which of them it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from weightcast.bridges.peft.placement import Placement
from weightcast.bridges.rules import Segment


class Factor(nn.Module):
    """One matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LowRank(nn.Module):
    """A and B of one update, as much of them as this rank has: `linear_in` [dim, num_in], `linear_out` [num_out, dim].

    The update is `scaling` times B·A. `weight_magnitude` [num_out] is DoRA's, or None.
    """

    def __init__(self, placement: Placement, factor_in: torch.Tensor, factor_out: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.placement = placement
        self.scaling = scaling
        self.linear_in = Factor(factor_in)
        self.linear_out = Factor(factor_out)
        self.register_parameter("weight_magnitude", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The update of the linear's output for its input, as the output is cut."""
        low = self.placement.lower(x.to(self.linear_in.weight.dtype), self.linear_in.weight)
        return self.placement.lift(low, self.linear_out.weight) * self.scaling

    def update(self, dtype: torch.dtype) -> torch.Tensor:
        """Of the weight: its rows and columns that are on this rank."""
        return (self.linear_out.weight.to(dtype) @ self.linear_in.weight.to(dtype)) * self.scaling

    def set_magnitude(self, norms: torch.Tensor) -> None:
        """Start DoRA with the norms of the weight's rows, so that nothing changes at first."""
        self.weight_magnitude = nn.Parameter(norms)

    def magnitude(self, norms: torch.Tensor) -> torch.Tensor:
        """DoRA's magnitude of each row."""
        assert self.weight_magnitude is not None
        return self.placement.whole(self.weight_magnitude)

    def pairs(self) -> Iterator[tuple[str, "LowRank"]]:
        """The pairs of factors, each with the prefix of its names."""
        yield "", self


@dataclass(frozen=True)
class PartRows:
    """The parts of a fused linear in order, and which of its rows on this rank each part's rows are."""

    num_rows: Mapping[str, int]
    order: tuple[int, ...]
    """For each row of the linear its place among all parts' rows, one part after the other."""

    @staticmethod
    def make(parts: Sequence[str], segments: Sequence[Segment]) -> "PartRows":
        """From the segments of the rule of a fused weight, whose HF names are the `parts`. Pure."""
        num_rows = {part: sum(item.num_rows for item in segments if item.hf == part) for part in parts}
        first, total = {}, 0
        for part, rows in num_rows.items():
            first[part], total = total, total + rows
        order: list[int] = []
        for segment in sorted(segments, key=lambda item: item.megatron_row):
            start = first[segment.hf] + segment.hf_row
            order += range(start, start + segment.num_rows)
        return PartRows(num_rows, tuple(order))


class SplitLowRank(nn.Module):
    """A `LowRank` for each adapted part of a fused linear; the rows of the other parts are left as they are."""

    order: torch.Tensor

    def __init__(self, parts: Mapping[str, LowRank], rows: PartRows) -> None:
        super().__init__()
        self.rows = rows
        self.parts = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)
        self.register_buffer("order", torch.tensor(rows.order, device="cpu"), persistent=False)

    def _part(self, name: str) -> LowRank | None:
        return getattr(self, name) if name in self.parts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        updates = {name: part(x) for name in self.rows.num_rows if (part := self._part(name)) is not None}
        like = next(iter(updates.values()))
        all_parts = [
            updates[name] if name in updates else like.new_zeros(*like.shape[:-1], num_rows)
            for name, num_rows in self.rows.num_rows.items()
        ]
        return torch.cat(all_parts, dim=-1).index_select(-1, self._order(like))

    def update(self, dtype: torch.dtype) -> torch.Tensor:
        updates = {name: part.update(dtype) for name in self.rows.num_rows if (part := self._part(name)) is not None}
        like = next(iter(updates.values()))
        all_parts = [
            updates[name] if name in updates else like.new_zeros(num_rows, like.shape[1])
            for name, num_rows in self.rows.num_rows.items()
        ]
        return torch.cat(all_parts).index_select(0, self._order(like))

    def set_magnitude(self, norms: torch.Tensor) -> None:
        for name, own in self._by_part(norms).items():
            if (part := self._part(name)) is not None:
                part.set_magnitude(own.clone())

    def magnitude(self, norms: torch.Tensor) -> torch.Tensor:
        """Rows of parts without an adapter have the magnitude that they have: `norms`."""
        by_part = [
            own if (part := self._part(name)) is None else part.magnitude(own)
            for name, own in self._by_part(norms).items()
        ]
        return torch.cat(by_part).index_select(0, self._order(norms))

    def _order(self, like: torch.Tensor) -> torch.Tensor:
        return self.order.to(like.device)

    def _by_part(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """A value a row of the linear, by part."""
        one_after_the_other = torch.empty_like(rows).index_copy_(0, self._order(rows), rows)
        sizes = list(self.rows.num_rows.values())
        return dict(zip(self.rows.num_rows, torch.split(one_after_the_other, sizes), strict=True))

    def pairs(self) -> Iterator[tuple[str, LowRank]]:
        """The pairs of factors, each with the prefix of its names."""
        for name in self.parts:
            part = self._part(name)
            assert part is not None
            yield f"{name}.", part
