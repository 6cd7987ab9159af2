"""Checks of broadcasts. One GPU is one NCCL rank, so `broadcast_version` over NCCL, which needs two, cannot be shown.

With one rank our group can be built, broadcast in, and closed. Over Gloo a version goes out of the device's memory to
an engine in another process, which is all of `broadcast_version` and `receive_version` but the backend's own copying.
"""

import time
from typing import Any

import torch
from tests.gpu.engine import following, hash_tensors
from tests.gpu.table import Scale, require
from tests.sync.parts import TensorSource, make_model

from weightcast.sync.transports.collective import CollectiveSource
from weightcast.sync.transports.collective_backend import BroadcastGroup, listen_store

TIMEOUT_S = 30.0


def check_collective(scale: Scale) -> dict[str, Any]:
    """One version of a model of awkward tensors over Gloo."""
    tensors = {name: tensor.to(scale.device) for name, tensor in make_model(0, scale.pick(64, 4096)).items()}
    with CollectiveSource(
        TensorSource(tensors), "tcp://127.0.0.1:0", engines=("engine",), timeout_s=TIMEOUT_S
    ) as source:
        settings = {"collective": True, "address": source.address, "engine": "engine"}
        with following(settings) as (engine,):
            report = source.broadcast(1)
            said = engine.hear()
    require(said["hashes"] == hash_tensors(tensors.items()), "the engine's tensors have other bits")
    return {"num_bytes": report.num_bytes, "seconds": report.seconds}


def check_nccl_alone(scale: Scale) -> dict[str, Any]:
    """A group of rank 0 alone: its broadcasts end within their deadlines and leave the bits as they are."""
    store = listen_store("127.0.0.1", 0, TIMEOUT_S)
    group = BroadcastGroup.build("nccl", store, rank=0, size=1, timeout_s=TIMEOUT_S)
    tensor = torch.arange(1 << 20, device=scale.device)
    wanted = tensor.clone()
    start_s = time.monotonic()
    for _ in range(3):
        deadline = time.monotonic() + TIMEOUT_S
        group.wait(group.broadcast(tensor, deadline), deadline, lambda: None)
    seconds = time.monotonic() - start_s
    require(bool(torch.equal(tensor, wanted)), "a broadcast among one changed the bits")
    group.close()
    return {"three_broadcasts_s": seconds, "note": "two ranks need two GPUs"}
