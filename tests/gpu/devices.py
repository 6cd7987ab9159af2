"""Checks of what a source and an engine do on a device: packing, comparing, CUDA IPC, staging."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tests.gpu.codecs import change
from tests.gpu.engine import Engine, following, hash_tensors
from tests.gpu.table import Scale, require
from tests.sync.parts import TensorSource, make_model, make_specs, random_bits

from weightcast.sync import WeightPublisher
from weightcast.sync.chunks import lay_out_chunks
from weightcast.sync.device_packer import DevicePacker
from weightcast.sync.packer import Packer, PackMode
from weightcast.sync.regions import dtype_name
from weightcast.sync.snapshot import Snapshot, allocate_arena
from weightcast.sync.transports import cuda_ipc
from weightcast.sync.version import Version

# What a training step and the steps after it are like: little, nothing, much, everything.
DENSITIES = (0.01, 0.0, 0.3, 1.0, 0.002)
HISTORY = 3


def check_device_delta(scale: Scale) -> dict[str, Any]:
    """Version by version the same answers to every request, from a packer here and one there."""
    seconds: dict[str, float] = {"host": 0.0, "device": 0.0}
    compared = 0
    modes: tuple[PackMode, ...] = ("off", "on", "zstd")
    for mode in modes:
        for host_is_read in (False, True):
            compared += compare_packers(scale, mode, host_is_read, seconds)
    return {"answers_compared": compared, "pack_s": seconds}


def compare_packers(scale: Scale, mode: PackMode, host_is_read: bool, seconds: dict[str, float]) -> int:
    """How many answers were alike."""
    here = make_model(1) | {"large": random_bits(torch.bfloat16, (scale.pick(60, 900), 1031), 5)}
    there = {name: tensor.to(scale.device) for name, tensor in here.items()}
    packers = {"host": _make_packer(here, None, False), "device": _make_packer(there, scale.device, host_is_read)}
    compared = 0
    for number, density in enumerate((0.0, *DENSITIES), 1):
        for seed, (name, tensor) in enumerate(here.items()):
            tensor.copy_(change(tensor, density, 100 * number + seed).view(tensor.shape))
            there[name].copy_(tensor)
        snapshots = {}
        for name, packer in packers.items():
            start_s = time.perf_counter()
            snapshots[name] = packer.begin(Version(1, number), mode)
            for _ in range(len(snapshots[name])):
                packer.pack_next(snapshots[name])
            seconds[name] += time.perf_counter() - start_s
        where = f"version {number} ({mode}, {density:g} changed)"
        figures = [(packer.digests(), packer.delta_bytes, packer.changed_elements) for packer in packers.values()]
        require(figures[0] == figures[1], f"{where}: digests, bytes and changes are {figures}")
        compared += _compare_answers(snapshots["host"], snapshots["device"], number, where)
    return compared


def _make_packer(tensors: Mapping[str, torch.Tensor], device: str | None, host_is_read: bool) -> Packer:
    specs = make_specs(tensors)
    regions = [spec.whole() for spec in specs]
    chunks = lay_out_chunks(regions, {spec.name: spec.dtype for spec in specs}, 16 << 10)
    held = {item.region: item for item in TensorSource(tensors).held()}
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    arguments = (held, {spec.name: spec for spec in specs}, regions, chunks, allocate_arena(num_bytes), HISTORY)
    if device is None:
        return Packer(*arguments)
    return DevicePacker(*arguments, torch.zeros(num_bytes, dtype=torch.uint8, device=device), host_is_read=host_is_read)


def _compare_answers(host: Snapshot, device: Snapshot, number: int, where: str) -> int:
    """Whole chunks, and what changed since each version that a receiver may have."""
    bases = [None, *(Version(1, base) for base in range(max(1, number - HISTORY - 1), number + 1))]
    for index in range(len(host)):
        for base in bases:
            bodies = [snapshot.body(index, base) for snapshot in (host, device)]
            alike = bodies[0].encoding == bodies[1].encoding and bytes(bodies[0].data or b"") == bytes(
                bodies[1].data or b""
            )
            require(
                alike, f"{where}: chunk {index} since {base} is {bodies[0].encoding} here, {bodies[1].encoding} there"
            )
    return len(host) * len(bases)


def check_cuda_ipc(scale: Scale) -> dict[str, Any]:
    """Four versions to four engines: on the device, in their own tensors there, on the host, over a connection.

    Once out of what the source packed, and once out of its parameters themselves.
    """
    return {name: _publish_over_ipc(scale, name) for name in ("packed", "in_place")}


def _publish_over_ipc(scale: Scale, name: str) -> dict[str, Any]:
    tensors = make_model(0) | {"large": random_bits(torch.bfloat16, (scale.pick(500, 16_000), 2048), 5)}
    tensors = {name: tensor.to(scale.device) for name, tensor in tensors.items()}
    address = f"ipc://{scale.folder}/{name}.socket"
    settings: list[dict[str, Any]] = [
        {"engine": "on-device", "transport": "cuda_ipc", "device": scale.device},
        {"engine": "in-place", "transport": "cuda_ipc", "device": scale.device, "into": describe(tensors)},
        {"engine": "on-host", "transport": "cuda_ipc"},
        {"engine": "by-zmq", "transport": "zmq"},
    ]
    densities = (1.0, 0.01, 0.0, 0.6)
    settings = [setting | {"address": address, "versions": len(densities)} for setting in settings]
    way: dict[str, Any] = {"delta": "off", "in_place": True} if name == "in_place" else {"delta": "on"}
    pack_s, stage_s = [], []
    with (
        WeightPublisher(TensorSource(tensors), address, expose=("cuda_ipc",), timeout_s=60, **way) as publisher,
        following(*settings) as engines,
    ):
        publisher.wait_for_subscribers(len(settings), 60)
        for number, density in enumerate(densities, 1):
            for seed, tensor in enumerate(tensors.values()):
                tensor.copy_(change(tensor.cpu(), density, 100 * number + seed).view(tensor.shape))
            report = publisher.publish(number)
            pack_s.append(round(report.phases_s["pack"], 4))
            stage_s.append({engine.engine: round(engine.stage_s, 4) for engine in report.engines})
            _compare(engines, number, hash_tensors(tensors.items()), scale.device)
            is_in_place = "hold" in report.phases_s
            require(is_in_place == (name == "in_place"), f"{name}: engines read in place is {is_in_place}")
    return {"gb": sum(tensor.nbytes for tensor in tensors.values()) / 1e9, "pack_s": pack_s, "stage_s": stage_s}


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int]]]:
    """What an engine in another process is to have: dtype and shape of each."""
    return {name: (dtype_name(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}


def _compare(engines: Sequence[Engine], number: int, wanted: Mapping[str, str], device: str) -> None:
    for engine in engines:
        said = engine.hear()
        require(
            said["version"] == number and said["hashes"] == wanted, f"version {number} at {engine.name}: other bits"
        )
        transport, place = (
            ("zmq" if engine.name == "by-zmq" else cuda_ipc.KIND),
            (device if engine.name in ("on-device", "in-place") else "cpu"),
        )
        require(said["transport"] == transport, f"{engine.name} received by {said['transport']}, not {transport}")
        require(said["places"] == [place], f"{engine.name} staged on {said['places']}, not {place}")
