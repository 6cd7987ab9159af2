"""A source of bf16 weights published as FP8: however its regions are cut, what arrives is the whole quantised."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tests.ranks import run_ranks
from tests.sync.parts import LIMITS, PROPERTY, WAIT_S, TensorSource, assert_same_bits, bits

from weightcast.bridges import codecs_fp8
from weightcast.sync import Region, WeightPublisher, WeightSource, WeightSubscriber
from weightcast.sync.errors import SourceError
from weightcast.sync.quantize import BLOCK, block_amax, quantize, scales_of, tensor_scales_of
from weightcast.sync.quantize_rules import Fp8Scheme, plan_fp8
from weightcast.sync.quantized_source import QuantizedSource
from weightcast.sync.regions import find_tiling_fault

LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{word}_proj.weight" for word in "qkvo")
NORM = "model.norm.weight"
EXPERTS = "model.mlp.experts"
BLOCKS, TENSOR = Fp8Scheme(kind="fp8_block", also=(EXPERTS,)), Fp8Scheme(kind="fp8_tensor", also=(EXPERTS,))


def make_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A model of few weights: three matrices that engines fuse, one alone, stacked ones, a vector."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {Q: (256, 200), K: (150, 200), V: (150, 200), OUT: (200, 256), EXPERTS: (4, 140, 130), NORM: (200,)}
    return {name: (torch.randn(shape, generator=generator) * 0.1).bfloat16() for name, shape in shapes.items()}


def expected(tensors: dict[str, torch.Tensor], scheme: Fp8Scheme) -> dict[str, torch.Tensor]:
    """Every tensor as published, from whole tensors."""
    found: dict[str, torch.Tensor] = {}
    plan = plan_fp8(TensorSource(tensors).specs(), scheme)
    for name, tensor in tensors.items():
        entry = plan.quantized.get(name)
        if entry is None:
            found[name] = tensor
            continue
        start = (0,) * tensor.dim()
        amax = block_amax(tensor, start, entry.block)
        if scheme.kind == "fp8_block":
            scales = scales_of(amax, scheme.division)
        else:
            together = [other for other, e in plan.quantized.items() if e.group == entry.group]
            if len(together) > 1:
                amax = torch.stack([tensors[n].float().abs().max() for n in together]).max().reshape(1, 1)
            scales = tensor_scales_of(amax)
        found[name] = quantize(tensor, scales, start, entry.block)
        found[entry.scales.name] = scales if scheme.kind == "fp8_block" else scales[..., 0, 0]
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Names in order, shapes, dtypes and bits."""
    assert list(found) == list(wanted)
    assert_same_bits(found, wanted)


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns, called at once as ranks would; the first failure is raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(3 * WAIT_S) for future in [pool.submit(call) for call in calls]]


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


def cut_rows(
    tensors: dict[str, torch.Tensor], borders: Mapping[str, Sequence[int]], num_ranks: int
) -> list[list[Region]]:
    """Tensors cut at rows: the pieces go to the ranks in turn; what is not named is on every rank."""
    cuts: list[list[Region]] = [[] for _ in range(num_ranks)]
    for spec in TensorSource(tensors).specs():
        if spec.name not in borders:
            for rank in cuts:
                rank.append(spec.whole())
            continue
        edges = [0, *borders[spec.name], spec.shape[0]]
        for index, (start, end) in enumerate(pairwise(edges)):
            rest = spec.shape[1:]
            cuts[index % num_ranks].append(Region(spec.name, (start, *(0 for _ in rest)), (end - start, *rest)))
    return cuts


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


def reduce_over_gloo(values: torch.Tensor) -> None:
    """What a trainer lends."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)


def publish_from_two_ranks(address: str, kind: str) -> list[str]:
    """Two versions of a model cut inside blocks, from gloo ranks."""
    rank = dist.get_rank()
    tensors = make_weights()
    regions = cut_rows(tensors, {Q: [100], K: [128], V: [33], EXPERTS: [3]}, 2)[rank]
    scheme = Fp8Scheme(kind=kind, also=(EXPERTS,))
    source = QuantizedSource(TensorSource(tensors, rank, 2, regions), scheme, reduce_amax=reduce_over_gloo)
    with WeightPublisher(source, address, chunk_bytes=8192, timeout_s=WAIT_S) as publisher:
        publisher.wait_for_subscribers(1)
        for version in (1, 2):
            for name, tensor in make_weights(version).items():
                tensors[name].copy_(tensor)
            source.prepare()
            report = publisher.publish(version)
    return list(report.serving)


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_tensor"])
def test_two_gloo_ranks_publish_what_one_would_have_quantised(kind: str, ipc: str) -> None:
    scheme = Fp8Scheme(kind=kind, also=(EXPERTS,))
    versions: list[dict[str, torch.Tensor]] = []

    def follow() -> None:
        with WeightSubscriber(ipc, engine="e", limits=LIMITS) as subscriber:
            for _ in range(2):
                update = subscriber.wait(60)
                versions.append({name: tensor.clone() for name, tensor in update})
                update.commit()

    results = in_threads(follow, lambda: run_ranks(publish_from_two_ranks, 2, ipc, kind))
    assert results[1] == [["e"], ["e"]], results
    for number, found in enumerate(versions, 1):
        assert_same(found, expected(make_weights(number), scheme))


def test_published_codes_are_read_back_by_the_bridge(ipc: str) -> None:
    tensors = make_weights(3)
    source = QuantizedSource(
        TensorSource({name: t for name, t in tensors.items() if t.dim() < 3}), Fp8Scheme(kind="fp8_block")
    )
    got: dict[str, torch.Tensor] = {}
    with (
        WeightPublisher(source, ipc, timeout_s=WAIT_S) as publisher,
        WeightSubscriber(ipc, engine="e", limits=LIMITS) as subscriber,
    ):
        publisher.wait_for_subscribers(1)

        def take() -> None:
            update = subscriber.wait(WAIT_S)
            got.update({name: tensor.clone() for name, tensor in update})
            update.commit()

        in_threads(take, lambda: publisher.publish(1))
    specs = {spec.name: spec for spec in source.specs()}
    assert codecs_fp8.find_coded(specs) == {name: tuple(tensors[name].shape) for name in (Q, K, V, OUT)}
    for name in (Q, K, V, OUT):
        region = Region(name, (7, 100), (130, 100))
        read = codecs_fp8.read(region, lambda r: got[r.name][r.slices], torch.float32)
        assert torch.allclose(read, tensors[name][region.slices].float(), rtol=2**-4, atol=2e-4)
    assert BLOCK == (codecs_fp8.BLOCK, codecs_fp8.BLOCK)
