"""Checks of what the source computes on the device: deltas, digests, FP8. Each against the CPU's own, byte by byte."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from tests.gpu.table import Scale, require
from tests.sync.parts import TensorSource, bits, random_bits

from weightcast.sync import Region
from weightcast.sync.delta_codec import as_elements, encode_delta
from weightcast.sync.delta_format import parse_delta
from weightcast.sync.delta_torch import apply_on_device, encode_in_torch, encode_many_on_device, encode_on_device
from weightcast.sync.digest import region_digest
from weightcast.sync.digest_torch import as_digest, region_sum
from weightcast.sync.quantize import DIVIDE_ON_CPU, DIVIDE_ON_GPU, MAX_CODE, scales_of
from weightcast.sync.quantize_rules import KINDS, Fp8Scheme
from weightcast.sync.quantized_source import QuantizedSource

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
DENSITIES = (0.0, 0.001, 0.008, 0.2, 1.0)


def check_deltas(scale: Scale) -> dict[str, Any]:
    """Every dtype and density; made there and here, applied there, applied once more, and half applied."""
    num_elements = scale.pick(20_011, 4_000_037)
    payload_bytes, changes = 0, 0
    for number, dtype in enumerate(DTYPES):
        for density in DENSITIES:
            old = random_bits(dtype, (num_elements,), number)
            new = change(old, density, number)
            where = f"{dtype} with {density:g} changed"
            payload = encode_delta(_elements(old), _elements(new))
            delta = encode_on_device(old.to(scale.device), new.to(scale.device))
            assert payload is not None and delta is not None
            require(
                delta.to_bytes() == payload, f"{where}: {delta.num_bytes} bytes there are not the {len(payload)} here"
            )
            _compare_both_ways(old.to(scale.device), new.to(scale.device), where)
            payload_bytes, changes = payload_bytes + len(payload), changes + delta.num_changes
            current = old.to(scale.device)
            parsed = parse_delta(payload, old.element_size(), num_elements)
            for state in ("old", "new", "torn"):
                if state == "torn":
                    current[: num_elements // 2] = old[: num_elements // 2].to(scale.device)
                apply_on_device(parsed, current)
                require(
                    torch.equal(bits(current).cpu(), bits(new)), f"{where}: wrong when applied to the {state} state"
                )
    return {"dtypes": len(DTYPES), "changes": changes, "payload_bytes": payload_bytes}


def _compare_both_ways(old: torch.Tensor, new: torch.Tensor, where: str) -> None:
    """The way there and the way back, by kernels where there are any and in torch operations."""
    (found,) = encode_many_on_device([(old, new)], both=True)
    (wanted,) = encode_in_torch([(old, new)], both=True)
    assert found is not None and wanted is not None
    alike = [
        bool(one and other and one.to_bytes() == other.to_bytes()) for one, other in zip(found, wanted, strict=True)
    ]
    require(alike == [True, True], f"{where}: the kernels' deltas are those of torch's operations: {alike}")


def _elements(tensor: torch.Tensor) -> Any:
    return as_elements(bits(tensor).numpy(), tensor.element_size())


def change(old: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """Random other bits in some elements: small steps in most, anything in one of a hundred."""
    generator = torch.Generator().manual_seed(seed)
    if old.dtype is torch.bool:
        return old ^ (torch.rand(old.shape, generator=generator) < density)
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    new = old.clone().view(signed)
    is_changed = torch.rand(old.shape, generator=generator) < density
    is_large = torch.rand(old.shape, generator=generator) < 0.01
    step = torch.randint(-3, 4, old.shape, generator=generator).to(signed)
    other = random_bits(old.dtype, tuple(old.shape), seed + 1000).view(signed)
    new = torch.where(is_changed, torch.where(is_large, other, new + step), new)
    return new.view(old.dtype)


def check_fp8(scale: Scale) -> dict[str, Any]:
    """Codes and scales by name, of both kinds and both formats; and how torch divides on the device by itself."""
    weights = _make_weights(scale.pick(256, 2048))
    figures: dict[str, Any] = {}
    for kind in KINDS:
        here, there = (_quantize(weights, kind, device) for device in ("cpu", scale.device))
        require(list(here) == list(there), f"{kind}: {sorted(set(here) ^ set(there))} are not on both")
        wrong = [name for name in here if not torch.equal(bits(here[name]), bits(there[name].cpu()))]
        require(not wrong, f"{kind}: other bits on {scale.device} in {wrong}")
        figures[f"{kind}_tensors"] = len(here)
    amax = torch.rand(100_000, generator=torch.Generator().manual_seed(1)).to(scale.device)
    by_torch = (amax.clamp(min=1e-4) / MAX_CODE).cpu()
    wanted = DIVIDE_ON_GPU if scale.device == "cuda" else DIVIDE_ON_CPU
    figures["division_as_torch"] = {
        division: bool(torch.equal(by_torch, scales_of(amax, division).cpu()))
        for division in (DIVIDE_ON_GPU, DIVIDE_ON_CPU)
    }
    require(figures["division_as_torch"][wanted], f"torch divides neither as {wanted!r} here: {figures}")
    return figures


def _make_weights(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.self_attn.{word}_proj.weight": (size, size + 72) for word in "qkvo"}
    shapes |= {f"{layer}.mlp.gate_proj.weight": (size + 30, size), "model.norm.weight": (size,)}
    shapes |= {f"{layer}.mlp.up_proj.weight": (size + 30, size), f"{layer}.mlp.down_proj.weight": (size, size + 30)}
    return {name: (torch.randn(shape, generator=generator) * 0.1).bfloat16() for name, shape in shapes.items()}


def _quantize(weights: Mapping[str, torch.Tensor], kind: str, device: str) -> dict[str, torch.Tensor]:
    source = QuantizedSource(
        TensorSource({name: tensor.to(device) for name, tensor in weights.items()}), Fp8Scheme(kind=kind)
    )
    source.prepare()
    start_s = time.monotonic()
    made = {item.region.name: item.live().clone() for item in source.held()}
    places = {tensor.device.type for tensor in made.values()}
    require(places == {device}, f"{kind} on {device} was made on {places} ({time.monotonic() - start_s:.2f} s)")
    return made


def check_digests(scale: Scale) -> dict[str, Any]:
    """Whole tensors and boxes of them, of every dtype, with rows shorter and longer than a table of weights."""
    rows, columns = scale.pick(7, 40), scale.pick(70_003, 300_007)
    compared = 0
    for number, dtype in enumerate(DTYPES):
        data = random_bits(dtype, (rows, columns), number)
        there = data.to(scale.device)
        for start in ((0, 0), (1, 3), (2, 40_000)):
            region = Region("weight", start, (rows - start[0], columns - start[1]))
            found = as_digest(region_sum(there[region.slices], region))
            wanted = region_digest(data[region.slices].contiguous(), region)
            require(found == wanted, f"{dtype} at {start}: {found:#x} there, {wanted:#x} here")
            compared += 1
    return {"compared": compared}
