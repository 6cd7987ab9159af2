"""Weights that a source quantises, how they are cut over ranks, and what must come of them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits

from weightcast.sync import Region
from weightcast.sync.quantize import block_amax, quantize, scales_of, tensor_scales_of
from weightcast.sync.quantize_rules import Fp8Scheme, plan_fp8

LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{word}_proj.weight" for word in "qkvo")
NORM = "model.norm.weight"
EXPERTS = "model.mlp.experts"


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
