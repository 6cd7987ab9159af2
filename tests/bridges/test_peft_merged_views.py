"""Merged weights made as they are read: each linear once in HF's order, with the bits that merging gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from weightcast.bridges import AutoBridge
from weightcast.bridges.peft import DoRA, LoRA, merged_adapters
from weightcast.bridges.peft.merged_views import LinearMerge, Merge, MergedParameter, merges_of
from weightcast.bridges.process_groups import destroy_distributed
from weightcast.sync.errors import ConfigError


class CountedMerge:
    """Another merge, and how often it was made."""

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.num_made = 0

    def prepare(self) -> None:
        self.merge.prepare()

    def __call__(self) -> torch.Tensor:
        self.num_made += 1
        return self.merge()


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def build(folder: Path, recipe: LoRA) -> tuple[AutoBridge, Any]:
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.register_pre_wrap_hook(recipe)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    with torch.no_grad():
        for parameter in (parameter for parameter in model[0].parameters() if parameter.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return bridge, model


@pytest.mark.parametrize("name", ["qwen3-tied", "mixtral"])  # of one file each
@pytest.mark.parametrize("recipe", [LoRA(dim=3), DoRA(dim=3)], ids=["lora", "dora"])
def test_every_linear_is_made_once_and_is_what_merging_gives(tiny_models: Path, name: str, recipe: LoRA) -> None:
    bridge, model = build(tiny_models / name, recipe)
    merges = {parameter: CountedMerge(merge) for parameter, merge in merges_of(model).items()}
    source = bridge.merged_source(model, merges=merges)
    source.prepare()
    found = {item.region: item.live().clone() for item in source.held()}
    assert {merge.num_made for merge in merges.values()} == {1}
    with merged_adapters(model):
        expected = {item.region: item.live() for item in bridge.weight_source(model).held()}
        assert found.keys() == expected.keys()
        for region, tensor in expected.items():
            assert torch.equal(found[region], tensor), region


def test_a_new_version_is_made_anew(tiny_models: Path) -> None:
    bridge, model = build(tiny_models / "qwen3", LoRA(dim=3))
    source = bridge.merged_source(model)
    item = next(item for item in source.held() if item.region.name.endswith("o_proj.weight"))
    with pytest.raises(ConfigError, match="call prepare"):
        item.live()
    source.prepare()
    before = item.live().clone()
    with torch.no_grad():
        model[0].decoder.layers[0].self_attention.linear_proj.adapter.linear_out.weight.add_(1)
    source.prepare()
    assert not torch.equal(item.live(), before)
    assert isinstance(item.live, MergedParameter)
    with pytest.raises(ConfigError, match="cannot be written"):
        item.live.write(before)
    assert all(isinstance(merge, LinearMerge) for merge in merges_of(model).values())
