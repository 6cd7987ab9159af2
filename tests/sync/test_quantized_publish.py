"""Weights quantised over two ranks with one reduction over Gloo, published, and read back by the bridge."""

import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks
from tests.sync.parts import LIMITS, WAIT_S, TensorSource
from tests.sync.quantized_parts import (
    EXPERTS,
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

from weightcast.bridges import codecs_fp8
from weightcast.sync import Region, WeightPublisher, WeightSubscriber
from weightcast.sync.quantize import BLOCK
from weightcast.sync.quantize_rules import Fp8Scheme
from weightcast.sync.quantized_source import QuantizedSource


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
