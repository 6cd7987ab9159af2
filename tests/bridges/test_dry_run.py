"""Dry runs: seats and shards are those of ranks that are set up in full; faults are named; numbers add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import run_ranks

from weightcast.bridges.dry_run_layout import Layout, Seat
from weightcast.sync.errors import ConfigError

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tensor": 2, "pipeline": 2, "context": 2, "world_size": 16},
    {"tensor": 4, "pipeline": 2, "virtual": 2, "world_size": 16},
    {"tensor": 1, "pipeline": 4, "world_size": 8},
    {"tensor": 2, "pipeline": 3, "stages": "E|t*4|L", "world_size": 6},
    {"tensor": 2, "pipeline": 2, "virtual": 3, "stages": "E|t|t*2||t|L", "world_size": 8},
)
# Layouts in which experts are cut otherwise than the dense layers; a dense model cannot have them.
EXPERT_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tensor": 2, "pipeline": 2, "expert": 4, "expert_tensor": 1, "world_size": 16},
    {"tensor": 4, "pipeline": 2, "expert": 2, "expert_tensor": 2, "world_size": 16},
    {"tensor": 1, "pipeline": 2, "expert": 4, "expert_tensor": 2, "context": 2, "world_size": 32},
)


def read_everything(models: str) -> dict[str, Any]:
    """The dry run's seats and boxes beside those of each rank with Megatron's groups set up for it alone."""
    return {
        "tied": [_both(Path(models, "llama3.2"), layout) for layout in LAYOUTS],
        "untied": [_both(Path(models, "qwen2"), LAYOUTS[0])],
        "experts": [_both(Path(models, "glm4-moe"), layout) for layout in EXPERT_LAYOUTS],
        "seats": [_seats(layout) for layout in EXPERT_LAYOUTS],
    }


def _both(folder: Path, sizes: dict[str, Any]) -> list[Any]:
    from weightcast.bridges import AutoBridge
    from weightcast.bridges.dry_run_stages import apply_layout, read_seats

    layout = Layout(**sizes)
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=False)
    apply_layout(provider, layout)
    ours = {seat: sorted((b.key, b.offset, b.shape) for b in boxes) for seat, boxes in read_seats(provider, layout)}
    theirs = [_one_rank(provider, sizes, rank) for rank in range(layout.num_ranks)]
    return [
        [ours[layout.seat(rank)] for rank in range(layout.num_ranks)],
        theirs,
        [box for boxes in ours.values() for box in boxes] != [],
    ]


def _one_rank(provider: Any, sizes: dict[str, Any], rank: int) -> list[Any]:
    from weightcast.bridges.shards import read_shards

    with fake_rank(sizes, rank), torch.device("meta"):
        virtual = provider.virtual_pipeline_model_parallel_size
        chunks = [provider.provide(vp_stage=stage) for stage in ([None] if virtual is None else range(virtual))]
        return sorted((shard.key, shard.offset, shard.view.shape) for shard in read_shards(chunks))


def _seats(sizes: dict[str, Any]) -> list[Any]:
    from megatron.core import parallel_state

    layout, theirs = Layout(**sizes), []
    for rank in range(layout.num_ranks):
        with fake_rank(sizes, rank):
            theirs.append(
                [
                    parallel_state.get_pipeline_model_parallel_rank(),
                    parallel_state.get_tensor_model_parallel_rank(),
                    parallel_state.get_expert_model_parallel_rank(),
                    parallel_state.get_expert_tensor_parallel_rank(),
                ]
            )
    return [[list(layout.seat(rank)) for rank in range(layout.num_ranks)], theirs]


class fake_rank:
    """This process as one rank of a world that does not exist, with Megatron's own groups for it."""

    def __init__(self, sizes: dict[str, Any], rank: int) -> None:
        self.sizes, self.rank = sizes, rank

    def __enter__(self) -> None:
        import torch.distributed as dist
        from megatron.core import parallel_state
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.sizes["world_size"])
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.sizes["tensor"],
            pipeline_model_parallel_size=self.sizes["pipeline"],
            virtual_pipeline_model_parallel_size=self.sizes.get("virtual"),
            context_parallel_size=self.sizes.get("context", 1),
            expert_model_parallel_size=self.sizes.get("expert", 1),
            expert_tensor_parallel_size=self.sizes.get("expert_tensor"),
            create_gloo_process_groups=False,
        )

    def __exit__(self, *error: object) -> None:
        import torch.distributed as dist
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def test_seats_and_shards_are_those_of_ranks_set_up_in_full(tiny_models: Path) -> None:
    (said,) = run_ranks(read_everything, 1, str(tiny_models), process_group=False)
    for ours, theirs, some in (*said["tied"], *said["untied"], *said["experts"]):
        assert some and ours == theirs
    for ours, theirs in said["seats"]:
        assert ours == theirs


def run_faults(models: str) -> dict[str, Any]:
    """A table that lacks a rule and one that has another too many, a model of one layer more, and a whole one."""
    from dataclasses import replace

    from weightcast.bridges import AutoBridge, Rename
    from weightcast.bridges.dry_run import plan_layout
    from weightcast.bridges.dry_run_report import as_json, estimate, fault_lines
    from weightcast.bridges.models.llama import LLAMA

    def run(family: Any, **changes: Any) -> Any:
        bridge = AutoBridge.from_hf_pretrained(Path(models, "llama2"), bridges=[family])
        for name, value in changes.items():
            setattr(bridge.hf_config, name, value)
        return plan_layout(bridge, Layout(tensor=2, pipeline=2, world_size=8))

    def rules(hf: Any) -> Any:
        return (*LLAMA.rules(hf)[1:], Rename("decoder.nothing", "model.nothing"))

    whole, faulty, longer = run(LLAMA), run(replace(LLAMA, rules=rules)), run(LLAMA, intermediate_size=64)
    return {
        "whole": as_json(whole, 8.0),
        "publish_s": estimate(whole, 8.0).publish_s,
        "faulty": as_json(faulty, 8.0)["faults"],
        "lines": fault_lines(faulty),
        "misfits": as_json(longer, 8.0)["faults"]["misfits"],
    }


def test_a_dry_run_counts_every_byte_and_names_every_fault(tiny_models: Path) -> None:
    (said,) = run_ranks(run_faults, 1, str(tiny_models), process_group=False)
    whole, faulty = said["whole"], said["faulty"]
    assert not any(whole["faults"].values())
    assert whole["num_distinct_plans"] == 4 and len(whole["ranks"]) == 8
    assert sum(plan["served_bytes"] for plan in whole["ranks"]) == whole["num_bytes"]
    assert all(0 < plan["served_bytes"] <= plan["held_bytes"] for plan in whole["ranks"])
    assert whole["largest_tensor"]["num_bytes"] == 131 * 32 * 4
    assert said["publish_s"] == pytest.approx(whole["num_bytes"] / 1e9)
    assert json.loads(json.dumps(whole)) == whole

    assert faulty["unmapped_megatron"] == ["embedding.word_embeddings.weight"]
    assert faulty["unfilled_hf"] == ["model.embed_tokens.weight"]
    assert faulty["absent_hf"] == ["model.nothing"]
    assert faulty["unmatched_rules"] == ["decoder.nothing"]
    assert "model.embed_tokens.weight: 0 of 4192 elements are held" in faulty["incomplete"][0]
    assert said["lines"][0] == "Megatron tensors without a rule: embedding.word_embeddings.weight"
    assert len(said["misfits"]) == 8 and "gate_proj.weight has shape (48, 32), decoder" in said["misfits"][0]


def test_seats_are_shared_by_copies() -> None:
    layout = Layout(tensor=2, pipeline=2, context=2, world_size=16)
    assert layout.seats()[Seat(1, 1, 0, 1)] == (9, 11, 13, 15)
    assert sum(len(ranks) for ranks in layout.seats().values()) == 16
    assert Layout(tensor=8, pipeline=16, expert=64, expert_tensor=1).num_ranks == 1024


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "edges"),
    [
        (61, 16, (3, 2)),
        (126, 16, (7, 7)),
        (64, 16, (None, None)),
        (61, 2, (31, 30)),
        (5, 1, (None, None)),
        (3, 4, (None, None)),
    ],
)
def test_layers_that_do_not_divide_are_cut_as_evenly_as_can_be(
    num_layers: int, num_stages: int, edges: tuple[int | None, int | None]
) -> None:
    from weightcast.bridges.dry_run_cuts import FIRST_SETTING, LAST_SETTING, choose_cut

    chosen = choose_cut(num_layers, 0, num_stages, None)
    assert (chosen.get(FIRST_SETTING), chosen.get(LAST_SETTING)) == edges


@pytest.mark.parametrize(
    ("num_layers", "mtp", "pipeline", "virtual", "spelled"),
    [
        (61, 1, 16, 2, "Et*1|(t*2|)*29t*1|t*1mL"),
        (6, 0, 2, 2, "Et*1|(t*2|)*2t*1L"),
        (5, 2, 2, 2, "Et*1|t*2|t*1|t*1mmL"),
    ],
)
def test_layers_that_do_not_divide_by_virtual_stages_are_spelled_for_megatron(
    num_layers: int, mtp: int, pipeline: int, virtual: int, spelled: str
) -> None:
    from weightcast.bridges.dry_run_cuts import LAYOUT_SETTING, choose_cut

    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # isort: skip

    assert choose_cut(num_layers, mtp, pipeline, virtual) == {LAYOUT_SETTING: spelled}
    PipelineParallelLayerLayout(spelled, pipeline).validate_layer_layout(num_layers, mtp or None)
    assert choose_cut(virtual * pipeline, mtp, pipeline, virtual) == {}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"stages": "Ettxx|L"}, r"not in Megatron's letters \(Invalid layer character: x"),
        ({"stages": "Et*3|tL|", "pipeline": 3}, "has 4 layers .t., the model 6; write as many, such as 'E"),
        ({"stages": "Et*3|t*3L", "pipeline": 3}, "has 2 stages, for pipeline=3 and virtual=None; write 3"),
        ({"stages": "Et*3|t*3|L|", "pipeline": 2, "virtual": 3}, "has 4 stages, for pipeline=2 and virtual=3; write 6"),
    ],
)
def test_a_string_of_stages_that_does_not_fit_is_refused(sizes: dict[str, Any], message: str) -> None:
    from weightcast.bridges.dry_run_cuts import virtual_size

    with pytest.raises(ConfigError, match=message):
        virtual_size(Layout(**sizes), num_layers=6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3, "world_size": 8}, "tensor x pipeline x context = 3 does not divide the world size 8"),
        ({"expert": 4, "expert_tensor": 1, "world_size": 2}, "expert tensor x expert x pipeline = 4 does not divide"),
        ({"tensor": 0}, "must all be at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(**sizes)
