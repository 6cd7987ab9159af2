"""Cases on one GPU: parameters into parameters of another process, and the delta codec on the device.

Imports without a GPU; measures only with one.
"""

import time
from contextlib import ExitStack
from statistics import median

import torch
from measure import take_turns
from moves import OURS, num_bytes
from peers import Link
from records import CaseError, Reading, Settings

from weightcast.sync.chunks import MAX_CHUNK_BYTES
from weightcast.sync.delta_format import Delta
from weightcast.sync.delta_torch import Pair, apply_on_device, encode_in_torch, encode_many_on_device

# Elements encoded at once: a bucket of 256 MiB of bf16.
BUCKET_ELEMENTS = 1 << 27
DENSITY = 0.008


def model_for(settings: Settings) -> str:
    """16.4 GB, or a small one to try the program."""
    return "tiny" if settings.quick else "qwen3-8b"


def race_ipc(settings: Settings, *, baseline: str | None) -> Reading:
    """GB/s from trainer parameters into engine parameters over CUDA IPC; None is a copy on the device."""
    model = model_for(settings)
    # The largest chunks: each costs a message, and nothing waits for a page of host memory.
    options = {"transport": "cuda_ipc", "expose": ["cuda_ipc"], "chunk_bytes": MAX_CHUNK_BYTES}
    state = {"device": "cuda"}
    with ExitStack() as stack:
        ours = stack.enter_context(Link(OURS, model, state, options, receiver_options=[{"device": "cuda"}]))
        contestants = {"ours": lambda: ours.move().seconds}
        if baseline is None:
            contestants["theirs"] = ours.copy
        else:
            theirs = stack.enter_context(Link(baseline, model, state))
            contestants["theirs"] = lambda: theirs.move().seconds
        times_s = take_turns(contestants, settings.rounds)
        note = f"carried by {', '.join(ours.transports())}, {num_bytes(model) / 1e9:.1f} GB"
    gbps = {name: [num_bytes(model) / 1e9 / s for s in values] for name, values in times_s.items()}
    return Reading(gbps["ours"], gbps["theirs"], "GB/s", note)


def measure_encode(settings: Settings, *, device: str = "cuda") -> Reading:
    """GB/s of dense bytes that the encoder reads, next to a copy of the same bytes on the device.

    Every bucket's delta, its parts on the host, is applied to the old state at the end and the bits are compared.
    """
    num_buckets, num_elements = (2, 1 << 20) if settings.quick else (16, BUCKET_ELEMENTS)
    before, after = make_states(num_buckets, num_elements, device)
    target = torch.empty_like(before)
    pairs = list(zip(before, after, strict=True))
    deltas: list[Delta] = []
    dense_gb = before.nbytes / 1e9

    def encode() -> float:
        start_s = _now(device)
        deltas[:] = _encode(pairs)
        return dense_gb / (_now(device) - start_s)

    def copy() -> float:
        start_s = _now(device)
        target.copy_(before)
        return dense_gb / (_now(device) - start_s)

    def encode_by_torch() -> float:
        start_s = _now(device)
        encode_in_torch(pairs, both=False)
        return dense_gb / (_now(device) - start_s)

    contestants = {"encode": encode, "copy": copy, "torch": encode_by_torch}
    gbps = take_turns(contestants, settings.rounds)
    target.copy_(before)
    for delta, current in zip(deltas, target, strict=True):
        apply_on_device(delta, current)
    if not torch.equal(target, after):
        raise CaseError("the delta codec on the device: what was applied is not what was encoded")
    note = (
        f"buckets of {before[0].nbytes / 2**20:.0f} MiB, 0.8 % changed; in torch operations {median(gbps['torch']):.0f}"
    )
    return Reading(gbps["encode"], gbps["copy"], "GB/s", note, {"torch_gbps": median(gbps["torch"])})


def make_states(num_buckets: int, num_elements: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits (int16) of bf16 weights before and after a step that moves 0.8 % of them by one unit."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_buckets, num_elements)
    before = torch.empty(shape, dtype=torch.int16, device=device)
    after = torch.empty_like(before)
    for old, new in zip(before, after, strict=True):
        weights = torch.empty(num_elements, device=device).normal_(0, 0.02, generator=generator)
        old.copy_(weights.to(torch.bfloat16).view(torch.int16))
        chance = torch.rand(num_elements, device=device, generator=generator)
        # Half of the changes go up, half go down.
        step = (chance < DENSITY / 2).to(torch.int16) - (chance > 1 - DENSITY / 2).to(torch.int16)
        torch.add(old, step, out=new)
    return before, after


def _encode(pairs: list[Pair]) -> list[Delta]:
    found = [one[0] for one in encode_many_on_device(pairs, both=False) if one is not None]
    assert len(found) == len(pairs), "without a limit there is always a delta"
    return found


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
