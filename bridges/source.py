"""PlanSource: a rank of a Megatron model as a source of versions.

It offers what the plan says this rank holds, replicas included; the publisher spreads the work over their holders.

    with WeightPublisher(PlanSource(plan), "tcp://127.0.0.1:5600") as publisher:
        publisher.publish(version=1)
"""

from collections.abc import Sequence

import torch

from weightcast.bridges.exchange import get_rank, get_world_size
from weightcast.bridges.hf_export import cast_specs
from weightcast.bridges.plan import Plan
from weightcast.sync.regions import HeldRegion, TensorSpec


class PlanSource:
    """A `weightcast.sync.WeightSource` over a plan. Making one issues no collective.

    `rank` and `world_size` count all ranks of the job. `dtype` replaces the floating dtypes of the HF tensors in what
    is published; by default they stay as in the HF checkpoint.
    """

    def __init__(self, plan: Plan, *, dtype: torch.dtype | None = None) -> None:
        self.rank = get_rank()
        self.world_size = get_world_size()
        self._specs = cast_specs(plan.specs, dtype)
        # A tied embedding may lie twice on one rank (virtual stages); one of the two is enough.
        self._held = tuple({held.region: held for held in plan.regions}.values())

    def specs(self) -> Sequence[TensorSpec]:
        """Every HF tensor of the whole model, in HF order."""
        return self._specs

    def held(self) -> Sequence[HeldRegion]:
        """The regions that this rank holds, in HF order, over the live parameters."""
        return self._held
