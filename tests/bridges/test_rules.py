"""Rules are index maps: what they split they put together again, under any cut of the Megatron tensor."""

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightcast.bridges.pieces import Lane, join_lanes, map_shard
from weightcast.bridges.rules import (
    FusedQkv,
    GatedMlp,
    ModelDimensions,
    Rename,
    Rule,
    Segment,
    Tied,
    Vocab,
    expand_rules,
    hf_shapes,
)
from weightcast.bridges.rules_experts import EXPERT, InterleavedGatedMlp, PerExpert, StackedExperts, Transposed
from weightcast.sync.errors import UnmappedTensor
from weightcast.sync.regions import Region, TensorSpec, find_tiling_fault

QKV = FusedQkv("decoder.layers.{layer}.qkv", q="{layer}.q", k="{layer}.k", v="{layer}.v")
DIMENSIONS = ModelDimensions(num_layers=2, num_attention_heads=4, num_query_groups=2, head_dim=3, vocab_size=7)


@st.composite
def rules_with_shapes(draw: st.DrawFn) -> tuple[Rule, tuple[int, ...], ModelDimensions]:
    """A rule, a global Megatron shape that fits it (matrix or bias), and the dimensions."""
    groups, per_group, head_dim = draw(st.tuples(*[st.integers(1, 4)] * 3))
    vocab, padding, rows = draw(st.tuples(st.integers(1, 20), st.integers(0, 9), st.integers(1, 12)))
    dimensions = ModelDimensions(1, groups * per_group, groups, head_dim, vocab)
    rule, num_rows = draw(
        st.sampled_from(
            [
                (Rename("m", "a"), rows),
                (Vocab("m", "a"), vocab + padding),
                (Tied("m", "a"), vocab + padding),
                (FusedQkv("m", "q", "k", "v"), groups * (per_group + 2) * head_dim),
                (GatedMlp("m", "gate", "up"), 2 * rows),
                (InterleavedGatedMlp("m", "gate_up"), 2 * rows),
            ]
        )
    )
    columns = draw(st.sampled_from([(), (1,), (5,), (8,)]))
    transposed, stacked = draw(st.tuples(st.booleans(), st.booleans()))
    if columns and transposed:
        rule = Transposed(rule)
    num_experts = draw(st.integers(0, 4))
    if num_experts == 0:
        return rule, (num_rows, *columns), dimensions
    if stacked:
        return StackedExperts(rule, num_experts), (num_experts, num_rows, *columns), dimensions
    return PerExpert(with_expert_in_names(rule), num_experts), (num_experts, num_rows, *columns), dimensions


def with_expert_in_names(rule: Rule) -> Rule:
    """The rule with `{expert}` behind each HF name; `at_layer` fills in any placeholder of templates."""
    if isinstance(rule, Transposed):
        return Transposed(with_expert_in_names(rule.rule))
    names = {field.name: f"{getattr(rule, field.name)}.{EXPERT}" for field in fields(rule)[1:]}  # type: ignore[arg-type]
    return replace(rule, **{name: text for name, text in names.items() if name != "copy"})  # type: ignore[type-var]


def cut(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Offsets and sizes of a random cut of a dimension."""
    inner = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
    edges = [0, *sorted(inner), size]
    return [(start, stop - start) for start, stop in itertools.pairwise(edges)]


@st.composite
def grids(draw: st.DrawFn, shape: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes (offset, shape) of a random grid over a tensor."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size in shape:
        boxes = [((*offset, o), (*box, s)) for offset, box in boxes for o, s in cut(draw, size)]
    return boxes


@given(rules_with_shapes(), st.data())
def test_any_cut_tiles_the_hf_tensors_and_gives_back_every_value(
    example: tuple[Rule, tuple[int, ...], ModelDimensions], data: st.DataObject
) -> None:
    rule, shape, dimensions = example
    segments = rule.segments(shape, dimensions)
    hf = {
        name: torch.arange(count, dtype=torch.int64).view(want) + index * 10**6
        for index, (name, want) in enumerate(hf_shapes(segments, shape).items())
        for count in [torch.Size(want).numel()]
    }
    assert set(hf) == set(rule.hf_names)
    megatron = torch.full(shape, -1, dtype=torch.int64)
    regions: list[Region] = []
    for offset, box in data.draw(grids(shape)):
        local = torch.full(box, -1, dtype=torch.int64)
        for region, parts in join_lanes((piece, local) for piece in map_shard(segments, offset, box)):
            for piece, tensor in parts:
                piece.of_box(tensor).copy_(piece.of_region(hf[region.name][region.slices]))  # import
            regions.append(region)
        megatron[Region("m", offset, box).slices] = local

    for name, tensor in hf.items():
        spec = TensorSpec(name, torch.int64, tuple(tensor.shape))
        assert find_tiling_fault(spec, [region for region in regions if region.name == name]) is None
        back = torch.full_like(tensor, -2)
        for piece in map_shard(segments, (0,) * len(shape), shape):
            if piece.region.name == name:
                piece.of_region(back[piece.region.slices]).copy_(piece.of_box(megatron))  # export
        assert torch.equal(back, tensor)


@given(rules_with_shapes(), st.data())
def test_any_box_of_an_hf_tensor_is_put_together_from_the_pieces_that_it_meets(
    example: tuple[Rule, tuple[int, ...], ModelDimensions], data: st.DataObject
) -> None:
    rule, shape, dimensions = example
    segments = rule.segments(shape, dimensions)
    megatron = torch.arange(torch.Size(shape).numel()).view(shape)
    pieces = map_shard(segments, (0,) * len(shape), shape)
    for name, want in hf_shapes(segments, shape).items():
        whole = torch.full(want, -1)
        for piece in (piece for piece in pieces if piece.region.name == name):
            piece.of_region(whole[piece.region.slices]).copy_(piece.of_box(megatron))
        offset, box = data.draw(st.sampled_from(data.draw(grids(want))))
        region, part = Region(name, offset, box), torch.full(box, -1)
        for piece in (piece for piece in pieces if piece.region.name == name):
            if (overlap := piece.overlap(region)) is not None:
                part[overlap[0]] = piece.of_box(megatron)[overlap[1]]
        assert torch.equal(part, whole[region.slices])


def test_gate_and_up_of_a_rank_are_one_region_wherever_they_lie() -> None:
    segments = StackedExperts(Transposed(InterleavedGatedMlp("m", "gate_up")), 4).segments((4, 12, 5), DIMENSIONS)
    gate, up = (map_shard(segments, (3, first, 0), (1, 2, 5)) for first in (4, 10))  # of the last of three ranks
    ((region, parts),) = join_lanes([(gate[0], "gate"), (up[0], "up")])
    assert region == Region("gate_up", (3, 0, 8), (1, 5, 4))
    assert [(piece.lane, owner) for piece, owner in parts] == [(Lane(2, 0, 2), "gate"), (Lane(2, 1, 2), "up")]
    alone = [region for region, _ in join_lanes([(gate[0], "gate")])]
    assert alone == [Region("gate_up", (3, 0, 8), (1, 5, 1)), Region("gate_up", (3, 0, 10), (1, 5, 1))]


def test_qkv_rows_are_interleaved_by_query_group() -> None:
    assert QKV.at_layer(1).segments((24, 5), DIMENSIONS) == (
        Segment("1.q", 0, 0, 6),
        Segment("1.k", 6, 0, 3),
        Segment("1.v", 9, 0, 3),
        Segment("1.q", 12, 6, 6),
        Segment("1.k", 18, 3, 3),
        Segment("1.v", 21, 3, 3),
    )


def test_gate_comes_before_up() -> None:
    assert GatedMlp("m", gate="g", up="u").segments((8, 2), DIMENSIONS) == (
        Segment("g", 0, 0, 4),
        Segment("u", 4, 0, 4),
    )


def test_experts_are_tensors_of_their_own_or_stacked_or_turned() -> None:
    values = torch.arange(2 * 4 * 3).view(2, 4, 3)  # two experts of gate rows 0 and 1, up rows 2 and 3, three columns
    fc1 = GatedMlp("l{layer}", gate="{layer}.{expert}.gate", up="{layer}.{expert}.up")
    assert laid_out(PerExpert(fc1, 2).at_layer(7), values) == {
        "7.0.gate": values[0, :2].tolist(),
        "7.0.up": values[0, 2:].tolist(),
        "7.1.gate": values[1, :2].tolist(),
        "7.1.up": values[1, 2:].tolist(),
    }
    turned = StackedExperts(Transposed(InterleavedGatedMlp("l{layer}", "{layer}.gate_up")), 2).at_layer(7)
    assert turned.megatron == "l7"
    assert laid_out(turned, values) == {"7.gate_up": values[:, [0, 2, 1, 3]].mT.tolist()}


def laid_out(rule: Rule, values: torch.Tensor) -> dict[str, list[Any]]:
    """The HF tensors that `rule` makes of a whole Megatron tensor."""
    segments = rule.segments(tuple(values.shape), DIMENSIONS)
    hf = {name: torch.full(shape, -1) for name, shape in hf_shapes(segments, tuple(values.shape)).items()}
    for piece in map_shard(segments, (0,) * values.ndim, tuple(values.shape)):
        piece.of_region(hf[piece.region.name][piece.region.slices]).copy_(piece.of_box(values))
    return {name: tensor.tolist() for name, tensor in hf.items()}


def test_padding_of_the_vocabulary_is_no_region() -> None:
    segments = Vocab("m", "a").segments((12, 2), DIMENSIONS)
    assert map_shard(segments, (8, 0), (4, 2)) == ()
    assert [piece.region for piece in map_shard(segments, (4, 0), (4, 2))] == [Region("a", (4, 0), (3, 2))]


@pytest.mark.parametrize(
    ("rule", "rows", "message"),
    [
        (Vocab("emb", "a"), 6, "fewer than the 7 tokens of a"),
        (QKV, 25, "24"),
        (GatedMlp("mlp", "g", "u"), 5, "equally many"),
        (InterleavedGatedMlp("mlp", "gu"), 5, "equally many"),
        (PerExpert(Rename("fc2", "{expert}.down"), 4), 5, "maps 4 experts"),
        (StackedExperts(Rename("fc2", "down"), 4), 5, "maps 4 experts"),
        (StackedExperts(Transposed(Rename("bias", "bias")), 5), 5, "has 1 dimensions where Transposed looks"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(rule: Rule, rows: int, message: str) -> None:
    with pytest.raises(UnmappedTensor, match=message) as caught:
        rule.segments((rows, 2), DIMENSIONS)
    assert rule.megatron in str(caught.value)


def test_rules_are_expanded_at_every_layer_and_nowhere_twice() -> None:
    table = expand_rules([QKV, Rename("norm", "final")], num_layers=2)
    assert list(table) == ["decoder.layers.0.qkv", "decoder.layers.1.qkv", "norm"]
    assert table["decoder.layers.1.qkv"].hf_names == ("1.q", "1.k", "1.v")
    with pytest.raises(UnmappedTensor, match="two rules claim the Megatron tensor norm"):
        expand_rules([Rename("norm", "a"), Rename("norm", "b")], num_layers=1)


def test_a_tied_rule_keeps_the_copy_it_may_lack() -> None:
    assert Tied("out", "emb").at_layer(3) == Tied("out", "emb", copy=None)
    assert Tied("out", "emb", copy="head").at_layer(3).copy == "head"
