"""Layouts and shapes drawn at random: the regions of all ranks are each HF tensor, whole and without overlap.

Every rank of a layout is planned by Megatron's own `sharded_state_dict` on meta tensors, in this one process.
"""

import math
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.bridges.drawn_layouts import Case, draw_case
from tests.bridges.layout_tables import CP, EP, ETP, PP, TP, VPP

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run_layout import Layout, Seat
from weightcast.bridges.dry_run_stages import Box, apply_layout, read_seats
from weightcast.bridges.plan import Plan, Stages, lay_table
from weightcast.bridges.rule_table import RuleTable
from weightcast.bridges.shards import ParameterView, Shard
from weightcast.bridges.standalone_mapped import dimensions_of
from weightcast.sync.regions import Region, TensorSpec, find_tiling_fault

# Megatron's own call, for latent attention without a latent of queries.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

MAX_RANKS = 16
_PLACES = {"tensor": TP, "pipeline": PP, "virtual": VPP, "context": CP, "expert": EP, "expert_tensor": ETP}


def plan_seats(case: Case) -> Iterator[tuple[Seat, Layout, Plan]]:
    """The plan of each seat of the case's layout; every element of a shard is in a region or is padding."""
    bridge = AutoBridge.from_hf_config(case.config())
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.make_vocab_size_divisible_by = case.vocab_multiple
    for name, value in case.settings.items():
        setattr(provider, name, value)
    sizes = {place: case.settings[name] for place, name in _PLACES.items() if name in case.settings}
    layout = Layout(**sizes, world_size=case.num_ranks)
    apply_layout(provider, layout)
    table = RuleTable.make(bridge.family.rules(bridge.hf_config), dimensions_of(provider), bridge.hf_specs())
    for seat, boxes in read_seats(provider, layout):
        stages = Stages(first=seat.pipeline == 0, last=seat.pipeline == layout.pipeline - 1)
        plan = lay_table(table, [as_shard(box) for box in boxes], stages)
        mapped = sum(held.region.numel for held in plan.regions if held.region.name not in plan.copies)
        padding = sum(math.prod(view.shape) for view in plan.padding)
        assert mapped + padding == sum(math.prod(box.shape) for box in boxes), case
        yield seat, layout, plan


def as_shard(box: Box) -> Shard:
    """The box with a parameter of its own, on the meta device."""
    parameter = torch.empty(box.shape, dtype=box.dtype, device="meta")
    return Shard(box.key, box.global_shape, box.offset, ParameterView(parameter, box.shape, parameter.stride(), 0))


def check_case(case: Case) -> None:
    """Each HF tensor is made of distinct regions that tile it, and every one of them is held equally often."""
    holders: dict[str, Counter[Region]] = {}
    specs: tuple[TensorSpec, ...] = ()
    for seat, layout, plan in plan_seats(case):
        specs = plan.specs
        times = len(layout.seats()[seat])
        for region in {held.region for held in plan.regions}:
            holders.setdefault(region.name, Counter())[region] += times
    assert specs
    for spec in specs:
        assert find_tiling_fault(spec, list(holders[spec.name])) is None, (spec, case)
        assert len(set(holders[spec.name].values())) == 1, (spec, holders[spec.name], case)
    assert set(holders) == {spec.name for spec in specs}


@settings(deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_regions_of_all_ranks_cover_each_tensor_once_a_replica(rng: Random) -> None:
    check_case(draw_case(rng, MAX_RANKS))


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_many_more_draws(rng: Random) -> None:
    check_case(draw_case(rng, 64))
