"""Rules are index maps: what they split they put together again, under any cut of the Megatron tensor."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    map_shard,
)
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
            ]
        )
    )
    columns = draw(st.sampled_from([(), (1,), (5,), (8,)]))
    return rule, (num_rows, *columns), dimensions


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
    megatron = torch.full(shape, -1, dtype=torch.int64)
    regions: list[Region] = []
    for offset, box in data.draw(grids(shape)):
        local = torch.full(box, -1, dtype=torch.int64)
        for piece in map_shard(segments, offset, box):
            local[piece.rows] = hf[piece.region.name][piece.region.slices]  # import
            regions.append(piece.region)
        megatron[Region("m", offset, box).slices] = local

    for name, tensor in hf.items():
        spec = TensorSpec(name, torch.int64, tuple(tensor.shape))
        assert find_tiling_fault(spec, [region for region in regions if region.name == name]) is None
        back = torch.full_like(tensor, -2)
        for piece in map_shard(segments, (0,) * len(shape), shape):
            if piece.region.name == name:
                back[piece.region.slices] = megatron[piece.rows]  # export
        assert torch.equal(back, tensor)


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
