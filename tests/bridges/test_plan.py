"""Plans: refusals by name, memory that stays live, and any rank of any layout in one process."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks

from weightcast.bridges.plan import Stages, lay_rules, lay_table
from weightcast.bridges.rule_table import RuleTable
from weightcast.bridges.rules import FusedQkv, GatedMlp, ModelDimensions, Rename, Rule, Tied, Vocab
from weightcast.bridges.rules_experts import PerExpert
from weightcast.bridges.shards import ParameterView, Shard
from weightcast.sync.assignment import assign_regions
from weightcast.sync.errors import UnmappedTensor
from weightcast.sync.regions import Region, TensorSpec

DIMENSIONS = ModelDimensions(num_layers=2, num_attention_heads=2, num_query_groups=1, head_dim=2, vocab_size=5)
WHOLE = Stages(first=True, last=True)
RULES: tuple[Rule, ...] = (
    Vocab("embedding.weight", "embed"),
    FusedQkv("decoder.layers.{layer}.qkv", q="{layer}.q", k="{layer}.k", v="{layer}.v"),
    GatedMlp("decoder.layers.{layer}.fc1", gate="{layer}.gate", up="{layer}.up"),
    Rename("decoder.norm", "norm"),
    Tied("output_layer.weight", "embed", copy="head"),
)
SHAPES = {
    "embedding.weight": (8, 3),
    **{
        f"decoder.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in (("qkv", (8,)), ("fc1", (4, 3)))
    },
    "decoder.norm": (3,),
}
SPECS = [
    TensorSpec("embed", torch.float32, (5, 3)),
    *(
        TensorSpec(f"{layer}.{name}", torch.float32, shape)
        for layer in range(2)
        for name, shape in (("q", (4,)), ("k", (2,)), ("v", (2,)), ("gate", (2, 3)), ("up", (2, 3)))
    ),
    TensorSpec("norm", torch.float32, (3,)),
]


def whole(key: str, shape: tuple[int, ...]) -> Shard:
    """A shard that is all of its tensor, over memory of its own."""
    parameter = torch.nn.Parameter(torch.arange(float(math.prod(shape))).view(shape))
    view = ParameterView(parameter, shape, tuple(parameter.stride()), 0)
    return Shard(key, shape, (0,) * len(shape), view)


def shards(without: Sequence[str] = ()) -> list[Shard]:
    return [whole(key, shape) for key, shape in SHAPES.items() if key not in without]


def test_a_plan_lists_every_region_in_hf_order_over_live_memory() -> None:
    held = shards()
    plan = lay_rules(held, WHOLE, DIMENSIONS, RULES, SPECS)
    assert [item.region for item in plan.regions] == [spec.whole() for spec in SPECS]
    assert plan.num_bytes == sum(spec.num_bytes for spec in SPECS)
    assert [view().shape for view in plan.padding] == [(3, 3)]
    assert [task.hf_names for task in plan.tasks[:2]] == [("embed",), ("0.q", "0.k", "0.v")]

    up = next(item for item in plan.regions if item.region.name == "1.up")
    parameter = next(shard.view.parameter for shard in held if shard.key == "decoder.layers.1.fc1")
    assert torch.equal(up.live(), parameter.detach()[2:])
    buffer = torch.zeros(100)
    parameter.data = buffer[20:32].view(4, 3)  # what DDP does
    buffer[20:32] = torch.arange(12.0)
    assert torch.equal(up.live(), torch.arange(6.0, 12.0).view(2, 3))


@pytest.mark.parametrize(
    ("rules", "held", "specs", "message"),
    [
        (
            RULES,
            [*shards(), whole("decoder.layers.0.fc1_bias", (4,))],
            SPECS,
            "no rule maps .* decoder.layers.0.fc1_bias",
        ),
        (RULES, shards(), [*SPECS, TensorSpec("extra", torch.float32, (1,))], "no rule fills the HF tensor extra"),
        (RULES, shards(), SPECS[:-1], "the rule of decoder.norm wants the HF tensor norm, which the HF model lacks"),
        (RULES, shards(without=["decoder.layers.1.fc1"]), SPECS, "GatedMlp of decoder.layers.1.fc1 matches nothing"),
        (RULES, shards(without=["decoder.norm"]), SPECS, "Rename of decoder.norm matches nothing"),
        (
            (*RULES, Rename("decoder.layers.{layer}.other", "{layer}.other")),
            shards(),
            [*SPECS, *(TensorSpec(f"{layer}.other", torch.float32, (1,)) for layer in range(2))],
            "Rename of decoder.layers.0.other matches nothing",
        ),
        ((*RULES, Rename("b", "norm")), shards(), SPECS, "norm is filled twice, from decoder.norm and b"),
        (
            RULES,
            shards(),
            [replace(spec, shape=(7,)) if spec.name == "norm" else spec for spec in SPECS],
            r"norm has shape \(7,\) in the HF model, but decoder.norm of shape \(3,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    rules: Sequence[Rule], held: Sequence[Shard], specs: Sequence[TensorSpec], message: str
) -> None:
    with pytest.raises(UnmappedTensor, match=message):
        lay_rules(held, WHOLE, DIMENSIONS, rules, specs)


def test_a_stage_is_asked_only_for_what_it_has() -> None:
    first = shards(without=["decoder.layers.1.qkv", "decoder.layers.1.fc1", "decoder.norm"])
    plan = lay_rules(first, Stages(first=True, last=False), DIMENSIONS, RULES, SPECS)
    assert {item.region.name for item in plan.regions} == {"embed", "0.q", "0.k", "0.v", "0.gate", "0.up"}
    assert plan.specs == tuple(SPECS)
    with pytest.raises(UnmappedTensor, match=r"embedding\.weight matches nothing"):
        lay_rules(first[1:], Stages(first=True, last=False), DIMENSIONS, RULES, SPECS)


def test_a_stored_copy_of_a_tied_tensor_is_held_under_both_names() -> None:
    specs = [*SPECS, TensorSpec("head", torch.float32, (5, 3))]
    plan = lay_rules(shards(), WHOLE, DIMENSIONS, RULES, specs)
    assert plan.copies == {"head": "embed"}
    live = {item.region.name: item.live() for item in plan.regions}
    assert live["head"].data_ptr() == live["embed"].data_ptr()


def test_first_layers_may_differ_from_the_rest_and_layers_elsewhere_have_numbers_of_their_own() -> None:
    dense = Rename("decoder.layers.{layer}.mlp", "{layer}.mlp").at_layer(0)
    sparse = PerExpert(Rename("decoder.layers.{layer}.experts", "{layer}.{expert}.mlp"), 2).at_layer(1)
    ahead = Rename("mtp.layers.0.mlp", "2.mlp")
    specs = [TensorSpec(name, torch.float32, (3, 2)) for name in ("0.mlp", "1.0.mlp", "1.1.mlp", "2.mlp")]
    table = RuleTable.make((dense, sparse, ahead), DIMENSIONS, specs)
    first = lay_table(table, [whole("decoder.layers.0.mlp", (3, 2))], Stages(first=True, last=False))
    assert [held.region.name for held in first.regions] == ["0.mlp"]

    experts = whole("decoder.layers.1.experts", (2, 3, 2))
    last = lay_table(table, [experts, whole("mtp.layers.0.mlp", (3, 2))], Stages(first=False, last=True))
    assert [held.region for held in last.regions] == [spec.whole() for spec in specs[1:]]
    second = last.regions[1].live()
    assert torch.equal(second, experts.view()[1]) and second.data_ptr() == experts.view()[1].data_ptr()
    with pytest.raises(UnmappedTensor, match="maps 2 experts"):
        lay_table(table, [whole("decoder.layers.1.experts", (4, 3, 2))], Stages(first=False, last=False))


@pytest.mark.parametrize(
    "index", [(1,), (slice(0, 2),), (1, slice(1, 3)), (slice(1, 2), slice(0, 2)), (0, 2, slice(1, 4))]
)
def test_a_part_of_a_view_is_what_indexing_gives(index: tuple[int | slice, ...]) -> None:
    tensor = torch.arange(24).view(2, 3, 4)
    view = ParameterView(tensor, (2, 3, 4), (12, 4, 1), 0)
    assert torch.equal(view.at(index)(), tensor[index])
    if tensor[index].ndim >= 2:
        assert torch.equal(view.at(index).transposed()(), tensor[index].mT)


def plan_every_rank() -> dict[str, int]:
    """Llama 3 8B at TP=8, PP=4 on the meta device: the 32 plans tile the model."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaConfig

    from weightcast.bridges import AutoBridge
    from weightcast.bridges.process_groups import destroy_distributed

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    bridge = AutoBridge.from_hf_config(config)
    holdings: dict[int, list[Region]] = {}
    for rank in range(32):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=32)
        parallel_state.initialize_model_parallel(8, 4, create_gloo_process_groups=False)
        provider = bridge.to_megatron_provider(load_weights=False)
        provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = 8, 4
        provider.finalize()
        with torch.device("meta"):
            plan = bridge.plan(provider.provide())
        assert all(held.live().device.type == "meta" for held in plan.regions)
        holdings[rank] = [held.region for held in plan.regions]
        destroy_distributed()
    served = assign_regions(plan.specs, holdings)  # raises unless they tile
    return {"ranks": len(served), "parameters": sum(region.numel for part in served.values() for region in part)}


def test_any_rank_of_a_large_layout_is_planned_without_memory_or_peers() -> None:
    (result,) = run_ranks(plan_every_rank, 1, process_group=False)
    assert result == {"ranks": 32, "parameters": 8_030_261_248}


def train_a_step(folder: str) -> dict[str, bool]:
    """Plan before wrapping, re-point the parameters, step, and read the regions."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from weightcast.bridges import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder, dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider()
    provider.finalize()
    sources = []
    provider.register_pre_wrap_hook(lambda model: sources.append(bridge.weight_source(model)))
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = provider.provide_distributed_model(ddp, wrap_with_ddp=True)
    (early,) = sources
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, use_distributed_optimizer=True, clip_grad=0.0), model
    )
    before = [held.live().clone() for held in early.held()]
    for parameter in model[0].parameters():
        parameter.main_grad.fill_(1.0)
    assert optimizer.step()[0]
    after = [held.live() for held in early.held()]
    late = [held.live() for held in bridge.weight_source(model).held()]
    parameters = {name.rsplit("module.", 1)[-1]: p for name, p in model[0].named_parameters()}
    norm = next(held.live() for held in early.held() if held.region.name == "model.norm.weight")
    return {
        "trained": all(not torch.equal(old, new) for old, new in zip(before, after, strict=True)),
        "same memory": all(a.data_ptr() == b.data_ptr() for a, b in zip(after, late, strict=True)),
        "the parameter's": torch.equal(norm, parameters["decoder.final_layernorm.weight"].data),
        "ddp": type(model[0]).__name__ == "DistributedDataParallel",
    }


def test_regions_stay_live_under_ddp_and_the_distributed_optimizer(tiny_models: Path) -> None:
    result = {"trained": True, "same memory": True, "the parameter's": True, "ddp": True}
    assert run_ranks(train_a_step, 2, str(tiny_models / "qwen3")) == [result] * 2
