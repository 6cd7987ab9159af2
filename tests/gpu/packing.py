"""How fast a source's weights come out of the device: the packer, and what pinned memory makes of it."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from tests.gpu.table import Scale, require
from tests.sync.parts import TensorSource, make_specs

from weightcast.sync.chunks import DEFAULT_CHUNK_BYTES, lay_out_chunks
from weightcast.sync.packer import Packer
from weightcast.sync.snapshot import allocate_arena
from weightcast.sync.version import Version

ROUNDS = 5


def check_packing(scale: Scale) -> dict[str, Any]:
    """GB/s of the packer and of plain copies, interleaved; the arena must hold the weights at the end."""
    side = scale.pick(256, 8192)
    tensors = {f"weight.{number}": _random(side, number).to(scale.device) for number in range(scale.pick(2, 8))}
    specs = make_specs(tensors)
    regions = [spec.whole() for spec in specs]
    chunks = lay_out_chunks(regions, {spec.name: spec.dtype for spec in specs}, DEFAULT_CHUNK_BYTES)
    held = {item.region: item for item in TensorSource(tensors).held()}
    num_bytes = sum(spec.num_bytes for spec in specs)
    arenas = {"packer": allocate_arena(num_bytes), "packer_pinned": allocate_arena(num_bytes)}
    is_pinned = scale.device == "cuda" and pin(arenas["packer_pinned"])
    packers = {
        name: Packer(held, {spec.name: spec for spec in specs}, regions, chunks, arena, 0)
        for name, arena in arenas.items()
    }
    numbers = iter(range(1, 1000))

    def pack(packer: Packer) -> None:
        snapshot = packer.begin(Version(1, next(numbers)), "off")
        for _ in range(len(snapshot)):
            packer.pack_next(snapshot)

    def copy(targets: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor, non_blocking=True)

    plain = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    calls: dict[str, Callable[[], None]] = {name: (lambda p=packer: pack(p)) for name, packer in packers.items()}  # type: ignore[misc]
    calls["copy"] = lambda: copy(plain)
    if scale.device == "cuda":
        pinned = {name: tensor.pin_memory() for name, tensor in plain.items()}
        calls["copy_pinned"] = lambda: copy(pinned)
    gbps = _measure(calls, num_bytes, scale.device)
    for name, arena in arenas.items():
        wanted = torch.cat([tensor.cpu().view(-1).view(torch.uint8) for tensor in tensors.values()])
        require(np.array_equal(arena, wanted.numpy()), f"{name}: the arena does not hold the weights")
    return {"gb": num_bytes / 1e9, "gbps": gbps, "pinned": is_pinned}


def _random(side: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (side, side), dtype=torch.int16, generator=generator).view(torch.bfloat16)


def pin(arena: Any) -> bool:
    """Lock the pages of an arena for the device; whether that could be done."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return int(runtime.cudaHostRegister(arena.ctypes.data, arena.nbytes, 0)) == 0


def _measure(calls: dict[str, Callable[[], None]], num_bytes: int, device: str) -> dict[str, float]:
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start_s = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times_s[name].append(time.perf_counter() - start_s)
    return {name: round(num_bytes / 1e9 / median(values), 2) for name, values in times_s.items()}
