"""What an engine refuses before it touches its memory, and the words around it."""

import pytest
import torch

from weightcast.adapters.conformance import make_faults
from weightcast.adapters.engine import (
    check_offer,
    check_pause_mode,
    check_ties,
    parse_label,
    specs_of,
    version_label,
)
from weightcast.sync import TensorSpec, Version
from weightcast.sync.errors import ConfigError, ModelMismatch

EMBED = TensorSpec("model.embed_tokens.weight", torch.bfloat16, (8, 4))
HEAD = TensorSpec("lm_head.weight", torch.bfloat16, (8, 4))
NORM = TensorSpec("model.norm.weight", torch.bfloat16, (4,))
TIES = {HEAD.name: EMBED.name}


@pytest.mark.parametrize(
    ("expected", "offered"),
    [([EMBED, NORM], [NORM, EMBED]), ([EMBED, NORM], [EMBED, HEAD, NORM]), ([EMBED, HEAD, NORM], [EMBED, NORM])],
    ids=["order", "tied head offered", "tied head not offered"],
)
def test_equal_sets_pass(expected: list[TensorSpec], offered: list[TensorSpec]) -> None:
    check_offer(expected, offered, TIES)


@pytest.mark.parametrize(
    ("offered", "named"),
    [
        ([EMBED, HEAD], "model.norm.weight: expected"),
        ([EMBED, HEAD, NORM, TensorSpec("model.bias", torch.bfloat16, (4,))], "model.bias: not expected"),
        ([EMBED, HEAD, TensorSpec(NORM.name, torch.bfloat16, (5,))], r"model.norm.weight: expected bfloat16 \[4\]"),
        ([EMBED, HEAD, TensorSpec(NORM.name, torch.float32, (4,))], "model.norm.weight.*float32"),
        ([EMBED, HEAD, NORM, NORM], "model.norm.weight: offered 2 times"),
        ([EMBED, NORM], "lm_head.weight: expected"),
        ([], "3 tensors differ"),
    ],
    ids=["missing", "extra", "shape", "dtype", "twice", "untied head", "nothing"],
)
def test_any_difference_is_named(offered: list[TensorSpec], named: str) -> None:
    with pytest.raises(ModelMismatch, match=named):
        check_offer([EMBED, HEAD, NORM], offered)


def test_a_long_list_of_differences_is_cut_and_counted() -> None:
    many = [TensorSpec(f"layers.{i}", torch.float32, (1,)) for i in range(40)]
    with pytest.raises(ModelMismatch, match=r"40 tensors differ.*and 28 more"):
        check_offer(many, [])


def test_tied_tensors_must_have_equal_values() -> None:
    table = torch.arange(6.0).view(2, 3)
    check_ties({EMBED.name: table, HEAD.name: table.clone()}, TIES)
    check_ties({EMBED.name: table}, TIES)
    with pytest.raises(ModelMismatch, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor"):
        check_ties({EMBED.name: table, HEAD.name: table + 1}, TIES)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pause_modes_are_those_of_vllm(mode: str) -> None:
    assert check_pause_mode(mode) == mode


def test_an_unknown_pause_mode_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'stop' is unknown; choose one of abort, wait, keep"):
        check_pause_mode("stop")


@pytest.mark.parametrize("version", [Version(0, 0), Version(1_763_000_000_000, 12)])
def test_labels_go_there_and_back(version: Version) -> None:
    assert parse_label(version_label(version)) == version


@pytest.mark.parametrize("label", ["default", "", "1", "1.", ".2", "v1.2", "1.2.3"])
def test_labels_of_others_are_no_version(label: str) -> None:
    assert parse_label(label) is None


def test_every_fault_of_the_conformance_kit_is_a_difference() -> None:
    tensors = {
        "model.layers.0.mlp.gate_proj.weight": torch.ones(6, 4),
        "model.layers.0.mlp.up_proj.weight": torch.ones(6, 4),
    }
    faults = make_faults(tensors)
    assert len({fault.title for fault in faults}) == 6
    for fault in faults:
        with pytest.raises(ModelMismatch, match=fault.tensor):
            check_offer(specs_of(tensors.items()), specs_of(fault.tensors.items()))
