"""Layouts: how many ranks a model is cut over, and which seat in the groups each rank has.

Megatron numbers ranks in the order tensor, context, (expert,) data, pipeline, the fastest first; dense layers and
experts are cut over the same ranks in two ways (megatron/core/parallel_state.py, `RankGenerator`). Ranks of one seat
hold the same regions: data and context parallel ranks are copies.

    layout = Layout(tensor=8, pipeline=16, expert=64, expert_tensor=1, world_size=1024)
    layout.seat(777)
"""

from dataclasses import dataclass
from typing import NamedTuple

from weightcast.sync.errors import ConfigError


class Seat(NamedTuple):
    """A rank's place in each kind of group that cuts weights."""

    pipeline: int
    tensor: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups. Raises `ConfigError` when they do not divide the ranks."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    """Virtual pipeline stages a rank."""
    stages: str | None = None
    """Megatron's string of what stands in each (virtual) stage, such as `E|t*2|t*2|L`; `None` cuts evenly."""
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    """`None` for the tensor parallel size, as in Megatron."""
    world_size: int | None = None
    """All ranks; `None` for as few as the sizes allow."""

    def __post_init__(self) -> None:
        sizes = (self.tensor, self.pipeline, self.context, self.expert, self.experts_tensor, self.num_ranks)
        if min(sizes) < 1:
            raise ConfigError(f"parallel sizes {sizes} must all be at least 1; correct the one that is not")
        dense = self.tensor * self.pipeline * self.context
        experts = self.experts_tensor * self.expert * self.pipeline
        for what, ranks in (("tensor x pipeline x context", dense), ("expert tensor x expert x pipeline", experts)):
            if self.num_ranks % ranks:
                raise ConfigError(
                    f"{what} = {ranks} does not divide the world size {self.num_ranks}; "
                    f"choose a multiple of {ranks}, or lower the sizes"
                )

    @property
    def experts_tensor(self) -> int:
        """Tensor parallel size of the experts."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def num_ranks(self) -> int:
        """All ranks of the job."""
        if self.world_size is not None:
            return self.world_size
        return self.pipeline * max(self.tensor * self.context, self.experts_tensor * self.expert)

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage; they are numbered one after the other."""
        return self.num_ranks // self.pipeline

    def seat(self, rank: int) -> Seat:
        """The seat of `rank`, 0 <= rank < `num_ranks`."""
        stage, place = divmod(rank, self.stage_ranks)
        return Seat(
            pipeline=stage,
            tensor=place % self.tensor,
            expert=place // self.experts_tensor % self.expert,
            expert_tensor=place % self.experts_tensor,
        )

    def seats(self) -> dict[Seat, tuple[int, ...]]:
        """The ranks of every seat, both in order."""
        ranks: dict[Seat, list[int]] = {}
        for rank in range(self.num_ranks):
            ranks.setdefault(self.seat(rank), []).append(rank)
        return {seat: tuple(ranks[seat]) for seat in sorted(ranks)}
