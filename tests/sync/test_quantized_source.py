"""A source of bf16 weights published as FP8: however its regions are cut, what arrives is the whole quantised."""

import logging
import threading
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY, WAIT_S, TensorSource, bits
from tests.sync.quantized_parts import (
    EXPERTS,
    NORM,
    OUT,
    K,
    Q,
    V,
    assert_same,
    cut_rows,
    expected,
    in_threads,
    make_weights,
)

from weightcast.sync import Region, WeightSource
from weightcast.sync.errors import SourceError
from weightcast.sync.quantize_rules import Fp8Scheme
from weightcast.sync.quantized_source import QuantizedSource
from weightcast.sync.regions import find_tiling_fault

BLOCKS, TENSOR = Fp8Scheme(kind="fp8_block", also=(EXPERTS,)), Fp8Scheme(kind="fp8_tensor", also=(EXPERTS,))


def gather(sources: Sequence[QuantizedSource]) -> dict[str, torch.Tensor]:
    """What a receiver would assemble; each element from every holder, which must agree, and none from nobody."""
    specs = {spec.name: spec for spec in sources[0].specs()}
    regions: dict[Region, torch.Tensor] = {}
    for source in sources:
        assert list(source.specs()) == list(specs.values())
        for item in source.held():
            live = item.live()
            assert tuple(live.shape) == item.region.shape and live.dtype == specs[item.region.name].dtype
            if item.region in regions:
                assert torch.equal(bits(regions[item.region]), bits(live))
            regions[item.region] = live.contiguous()
    tensors = {}
    for spec in specs.values():
        mine = [region for region in regions if region.name == spec.name]
        assert find_tiling_fault(spec, mine) is None, find_tiling_fault(spec, mine)
        tensors[spec.name] = torch.empty(spec.shape, dtype=spec.dtype)
        for region in mine:
            tensors[spec.name][region.slices] = regions[region]
    return tensors


class MaxOverSources:
    """A max-reduction of sources in one process: each call of the last one completes the reduction.

    Ranks are made and prepared in lockstep by threads, as real ranks are.
    """

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=WAIT_S)
        self._given: list[torch.Tensor] = []
        self._lock = threading.Lock()
        self.num_floats: list[int] = []

    def __call__(self, values: torch.Tensor) -> None:
        assert values.dtype == torch.float32 and values.dim() == 1
        with self._lock:
            self._given.append(values.clone())
        self._barrier.wait()
        largest = torch.stack(self._given).amax(0)
        if self._barrier.wait() == 0:
            self._given.clear()
            self.num_floats.append(values.numel())
        self._barrier.wait()
        values.copy_(largest)


def make_sources(
    tensors: dict[str, torch.Tensor], cuts: Sequence[Sequence[Region]], scheme: Fp8Scheme
) -> tuple[list[QuantizedSource], MaxOverSources]:
    """One prepared source a rank."""
    reduce = MaxOverSources(len(cuts))

    def make(rank: int) -> QuantizedSource:
        inner: WeightSource = TensorSource(tensors, rank, len(cuts), cuts[rank])
        source = QuantizedSource(inner, scheme, reduce_amax=reduce)
        source.prepare()
        return source

    return in_threads(*(partial(make, rank) for rank in range(len(cuts)))), reduce


@pytest.mark.parametrize("scheme", [BLOCKS, TENSOR], ids=["block", "tensor"])
def test_whole_tensors_on_one_rank(scheme: Fp8Scheme) -> None:
    tensors = make_weights()
    source = QuantizedSource(TensorSource(tensors), scheme)
    assert source.needs_prepare is (scheme is TENSOR)
    source.prepare()
    assert_same(gather([source]), expected(tensors, scheme))


def test_cuts_at_block_borders_need_no_reduction_and_no_prepare() -> None:
    tensors = make_weights()
    sources = [
        QuantizedSource(TensorSource(tensors, rank, 2, regions), BLOCKS)
        for rank, regions in enumerate(cut_rows(tensors, {Q: [128], K: [128], OUT: [128], EXPERTS: [1, 3]}, 2))
    ]
    assert not any(source.needs_prepare for source in sources)
    assert_same(gather(sources), expected(tensors, BLOCKS))


@pytest.mark.parametrize("scheme", [BLOCKS, TENSOR], ids=["block", "tensor"])
def test_regions_of_one_rank_that_split_blocks_need_no_reduction(scheme: Fp8Scheme) -> None:
    """Query groups of 64 rows, say; and a pipeline stage that holds all of some tensors and nothing of others."""
    tensors = make_weights()
    whole = cut_rows(tensors, {Q: list(range(64, 256, 64)), K: [75], V: [1, 149], EXPERTS: [2]}, 1)[0]
    stages = [[r for r in whole if r.name in (Q, K, V)], [r for r in whole if r.name not in (Q, K, V)]]
    sources = [QuantizedSource(TensorSource(tensors, rank, 2, regions), scheme) for rank, regions in enumerate(stages)]
    for source in sources:
        source.prepare()
    assert_same(gather(sources), expected(tensors, scheme))


@pytest.mark.parametrize("scheme", [BLOCKS, TENSOR], ids=["block", "tensor"])
def test_a_block_on_two_ranks_is_refused_without_a_reduction(scheme: Fp8Scheme) -> None:
    tensors = make_weights()
    for rank, regions in enumerate(cut_rows(tensors, {K: [100]}, 2)):
        with pytest.raises(SourceError, match=r"k_proj.weight \(150, 200\): this rank holds .* Give `reduce_amax`"):
            QuantizedSource(TensorSource(tensors, rank, 2, regions), scheme)


def test_a_matrix_fused_with_one_on_another_rank_is_refused_without_a_reduction() -> None:
    tensors = make_weights()
    regions = [spec.whole() for spec in TensorSource(tensors).specs()]
    with pytest.raises(SourceError, match=r"v_proj.weight .* holds 0 of 30000"):
        QuantizedSource(TensorSource(tensors, 0, 2, [r for r in regions if r.name != V]), TENSOR)


def test_the_reduction_is_of_a_few_numbers_and_one_a_version() -> None:
    tensors = make_weights()
    _, reduce = make_sources(tensors, cut_rows(tensors, {K: [100], Q: [128]}, 2), BLOCKS)
    # To agree on which: a flag a tensor. A version: the blocks of the one tensor that is cut inside a block.
    assert reduce.num_floats == [5, 4]
    _, reduce = make_sources(tensors, cut_rows(tensors, {K: [100]}, 2), TENSOR)
    assert reduce.num_floats == [3, 3]
    _, reduce = make_sources(tensors, cut_rows(tensors, {Q: [128]}, 2), BLOCKS)
    assert reduce.num_floats == [5]


@st.composite
def row_cuts(draw: st.DrawFn) -> tuple[int, dict[str, list[int]]]:
    """A number of ranks, and rows at which tensors are cut."""
    borders = {}
    for name, rows in ((Q, 256), (K, 150), (V, 150), (OUT, 200), (EXPERTS, 4)):
        if draw(st.booleans()):
            borders[name] = sorted(draw(st.sets(st.integers(1, rows - 1), min_size=1, max_size=3)))
    return draw(st.integers(1, 3)), borders


@given(row_cuts(), st.sampled_from([BLOCKS, TENSOR]), st.integers(0, 9))
@PROPERTY
def test_any_cut_over_any_ranks_is_the_whole_quantised(
    case: tuple[int, dict[str, list[int]]], scheme: Fp8Scheme, seed: int
) -> None:
    num_ranks, borders = case
    tensors = make_weights(seed)
    sources, _ = make_sources(tensors, cut_rows(tensors, borders, num_ranks), scheme)
    assert_same(gather(sources), expected(tensors, scheme))


def test_columns_and_corners_too() -> None:
    tensors = make_weights()
    parts = [
        Region(OUT, (0, 0), (77, 256)),
        Region(OUT, (77, 0), (123, 90)),
        Region(OUT, (77, 90), (60, 166)),
        Region(OUT, (137, 90), (63, 166)),
    ]
    rest = [spec.whole() for spec in TensorSource(tensors).specs() if spec.name != OUT]
    sources, _ = make_sources(tensors, [[parts[0], *rest], [parts[1], *rest], [*parts[2:], *rest]], BLOCKS)
    assert_same(gather(sources), expected(tensors, BLOCKS))


@pytest.mark.parametrize("scheme", [BLOCKS, TENSOR], ids=["block", "tensor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_without_a_code_are_refused_by_name(scheme: Fp8Scheme, bad: float) -> None:
    tensors = make_weights()
    tensors[OUT][150, 200] = bad
    source = QuantizedSource(TensorSource(tensors), scheme)
    with pytest.raises(SourceError, match=r"o_proj.weight has weights that are NaN or infinite"):
        source.prepare()
        gather([source])


def test_a_tensor_too_small_for_a_scale_is_refused_and_one_of_zeros_is_not() -> None:
    tensors = make_weights()
    tensors[OUT].zero_()
    source = QuantizedSource(TensorSource(tensors), TENSOR)
    source.prepare()
    found = gather([source])
    assert found[f"{OUT}_scale"].item() == 1.0 and not found[OUT].view(torch.uint8).any()
    tensors[OUT][0, 0] = 1e-37
    with pytest.raises(SourceError, match=r"o_proj.weight: the largest weight is .*e-3[78]"):
        gather([source])


def test_small_fused_weights_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tensors = {name: tensor * 0.01 for name, tensor in make_weights().items()}
    source = QuantizedSource(TensorSource(tensors), TENSOR)
    with caplog.at_level(logging.WARNING):
        source.prepare()
        source.prepare()
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == [K]


def test_weights_that_changed_since_prepare_are_refused() -> None:
    tensors = make_weights()
    source = QuantizedSource(TensorSource(tensors), TENSOR)
    codes = next(item for item in source.held() if item.region.name == V)
    with pytest.raises(SourceError, match="call `prepare"):
        codes.live()
    source.prepare()
    before = codes.live()
    tensors[V].mul_(0.5)
    with pytest.raises(SourceError, match=r"v_proj.weight\[0:150, 0:200\] has changed since `prepare"):
        codes.live()
    for name in (Q, K):
        tensors[name].mul_(0.5)
    source.prepare()
    # Half of all weights that share a scale have half the scale, and the same codes.
    assert torch.equal(bits(codes.live()), bits(before))


def test_weights_of_another_dtype_are_rounded_to_the_engines_first() -> None:
    tensors = make_weights()
    wide = {name: tensor.float() + 1e-6 for name, tensor in tensors.items()}
    source = QuantizedSource(TensorSource(wide), BLOCKS)
    rounded = expected({name: tensor.bfloat16() for name, tensor in wide.items()}, BLOCKS)
    assert_same(gather([source]), rounded | {NORM: wide[NORM]})
