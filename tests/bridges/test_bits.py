"""Import and export move bits, in every layout, and nothing but an export talks to another rank."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.no_collectives import CollectiveIssued, no_collectives
from tests.bridges.tiny_models import MOE_MODELS, TINY_MODELS
from tests.ranks import run_ranks

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_import import import_weights
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.checkpoint_files import CheckpointFiles, open_checkpoint
from weightcast.sync.regions import HeldRegion

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"TP1": {}},
    2: {
        "TP2": {"tensor_model_parallel_size": 2},
        "PP2": {"pipeline_model_parallel_size": 2},
        "VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "DP2": {},
        "EP2": {"expert_model_parallel_size": 2},
    },
    4: {
        "TP2×PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "TP4, 2 kv heads": {"tensor_model_parallel_size": 4},
        "TP2×DP2": {"tensor_model_parallel_size": 2},
        "EP4": {"expert_model_parallel_size": 4},
        "EP2×PP2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "EP2×TP2": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        "EP2×TP2, ETP1": {
            "expert_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    },
}


MOVED = ("llama3.2", "qwen2", "gemma3", "glm4-moe")


def build(bridge: AutoBridge, layout: dict[str, int]) -> "list[MegatronModule]":
    """An unfilled model: every parameter is NaN, so that what an import forgets shows."""
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, size in layout.items():
        setattr(provider, name, size)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    with torch.no_grad():
        for weight in weights_of(model):
            weight.fill_(float("nan"))
    return model


def weights_of(model: "list[MegatronModule]") -> list[torch.Tensor]:
    """The parameters of this rank, once each, and the buffers that checkpoints hold."""
    parameters = {id(parameter): parameter for chunk in model for parameter in chunk.parameters()}
    buffers = [buffer for chunk in model for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
    return [*parameters.values(), *buffers]


def models_of(layout: dict[str, int]) -> list[str]:
    """The models that can have the layout."""
    return list(MOE_MODELS if "expert_model_parallel_size" in layout else TINY_MODELS)


def import_one(bridge: AutoBridge, model: "list[MegatronModule]", checkpoint: CheckpointFiles) -> None:
    """Plan and import; the bytes read are those owned, once, and copies with what they are compared with."""
    plan = bridge.plan(model)
    report = import_weights(plan, checkpoint)
    weights = weights_of(model)
    padding_bytes = sum(view().numel() * view().element_size() for view in plan.padding)
    owned_bytes = sum(weight.numel() * weight.element_size() for weight in weights) - padding_bytes
    copies = [held for held in plan.regions if held.region.name in plan.copies]
    copied_bytes = sum(held.live().numel() * held.live().element_size() for held in copies)
    assert plan.num_bytes == owned_bytes + copied_bytes
    assert report.num_bytes == owned_bytes + 2 * copied_bytes
    assert not any(weight.isnan().any() for weight in weights)


def check_regions(held: list[HeldRegion], checkpoint: CheckpointFiles) -> None:
    with checkpoint.reader() as reader:
        for item in held:
            assert torch.equal(item.live(), reader.read(item.region)), item.region


def check_export(bridge: AutoBridge, model: "list[MegatronModule]", checkpoint: CheckpointFiles) -> None:
    exported = list(bridge.export_hf_weights(model, cpu=True))
    assert [name for name, _ in exported] == [spec.name for spec in checkpoint.specs]
    with checkpoint.reader() as reader:
        for (name, tensor), spec in zip(exported, checkpoint.specs, strict=True):
            assert tensor.dtype == spec.dtype and torch.equal(tensor, reader.read(spec.whole())), name


def check_same_files(folder: Path, checkpoint: CheckpointFiles) -> None:
    saved = open_checkpoint(folder)
    assert {spec.name: spec for spec in saved.specs} == {spec.name: spec for spec in checkpoint.specs}
    with saved.reader() as ours, checkpoint.reader() as theirs:
        for spec in saved.specs:
            assert torch.equal(ours.read(spec.whole()), theirs.read(spec.whole())), spec.name


def move_bits(models: str, out: str) -> list[str]:
    """Every layout of this world size, every family. Returns what was done, as proof that it ran."""
    done: list[str] = []
    for number, (layout_name, layout) in enumerate(LAYOUTS[dist.get_world_size()].items()):
        for family in models_of(layout):
            try:
                bridge = AutoBridge.from_hf_pretrained(Path(models, family))
                checkpoint = open_checkpoint(Path(models, family))
                model = build(bridge, layout)
                with no_collectives():
                    import_one(bridge, model, checkpoint)
                    source = bridge.weight_source(model)
                    check_regions(list(source.held()), checkpoint)
                assert list(source.specs()) == list(checkpoint.specs)
                check_export(bridge, model, checkpoint)
                folder = Path(out, f"{number}-{family}")
                bridge.save_hf_pretrained(model, folder, shard_bytes=50_000)
                check_same_files(folder, checkpoint)
            except Exception as error:
                raise AssertionError(f"{family} in {layout_name}") from error
            done.append(f"{family} in {layout_name}")
        destroy_model_parallel()
    return done


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_import_and_export_are_bit_exact_and_only_exports_communicate(
    world_size: int, tiny_models: Path, tmp_path: Path
) -> None:
    done = run_ranks(move_bits, world_size, str(tiny_models), str(tmp_path), timeout_s=400)
    wanted = [f"{family} in {name}" for name, layout in LAYOUTS[world_size].items() for family in models_of(layout)]
    assert done == [wanted] * world_size


def save_here_load_there(models: str, out: str) -> list[str]:
    """HF folder and Megatron checkpoint from TP=2 or EP=2, into PP=2 with virtual stages."""
    done: list[str] = []
    for family in MOVED:
        checkpoint = open_checkpoint(Path(models, family))
        bridge = AutoBridge.from_hf_pretrained(Path(models, family))
        model = build(bridge, LAYOUTS[2]["EP2" if family in MOE_MODELS else "TP2"])
        bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, Path(out, family), show_progress=False)
        bridge.save_megatron_model(model, Path(out, f"{family}-megatron"))
        destroy_model_parallel()

        there = AutoBridge.from_hf_pretrained(Path(out, family))
        model = build(there, LAYOUTS[2]["VPP2"])
        there.load_hf_weights(model)
        check_regions(list(bridge.weight_source(model).held()), checkpoint)
        settings: dict[str, Any] = dict(LAYOUTS[2]["VPP2"])
        model = there.load_megatron_model(Path(out, f"{family}-megatron"), **settings)
        assert len(model) == 2
        check_regions(list(bridge.weight_source(model).held()), checkpoint)
        destroy_model_parallel()
        done.append(family)
    return done


@pytest.mark.slow
def test_what_one_layout_saves_another_loads(tiny_models: Path, tmp_path: Path) -> None:
    done = run_ranks(save_here_load_there, 2, str(tiny_models), str(tmp_path))
    assert done == [list(MOVED)] * 2


def issue_collectives() -> list[str]:
    from torch.distributed import all_reduce

    tensor = torch.ones(1)
    others = (dist.get_rank() + 1) % 2
    attempts: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: all_reduce(tensor),
        "barrier": lambda: dist.barrier(),
        "all_gather_object": lambda: dist.all_gather_object([None, None], "x"),
        "broadcast": lambda: dist.broadcast(tensor, src=0),
        "isend": lambda: dist.isend(tensor, others),
        "batch_isend_irecv": lambda: dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, others)]),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.ones(2), torch.ones(2)),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(tensor, torch.ones(2)),
    }
    caught = []
    with no_collectives():
        for name, attempt in attempts.items():
            try:
                attempt()
            except CollectiveIssued:
                caught.append(name)
    dist.barrier()
    return [name for name in attempts if name not in caught]


def test_the_guard_against_collectives_fires() -> None:
    assert run_ranks(issue_collectives, 2) == [[], []]
