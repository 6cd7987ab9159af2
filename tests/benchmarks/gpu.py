"""Cases on one GPU: parameters into parameters of another process, the pass that this is made of, and the delta codec.

Imports without a GPU; measures only with one.
"""

import time
from contextlib import ExitStack
from itertools import accumulate
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import take_turns
from model_state import allocate, fill_normal
from moves import OURS, num_bytes
from peers import Link, Move
from records import CaseError, Reading, Settings
from shapes import MODELS

from weightcast.sync.chunks import MAX_CHUNK_BYTES, lay_out_chunks
from weightcast.sync.delta_format import Delta
from weightcast.sync.delta_torch import Pair, apply_on_device, encode_in_torch, encode_many_on_device
from weightcast.sync.device_passes import ChunkPasses, place_of
from weightcast.sync.digest_torch import as_digests, region_sum

# Elements encoded at once: a bucket of 256 MiB of bf16.
BUCKET_ELEMENTS = 1 << 27
DENSITY = 0.008


def model_for(settings: Settings) -> str:
    """16.4 GB, or a small one to try the program."""
    return "tiny" if settings.quick else "qwen3-8b"


def race_ipc(
    settings: Settings,
    *,
    baseline: str | None,
    direct: bool = False,
    points: bool = False,
    into: bool = False,
    device: str = "cuda",
    mover: str = OURS,
) -> Reading:
    """GB/s from trainer parameters into engine parameters over CUDA IPC; None is a copy on the device.

    With `direct` the engine reads the trainer's parameters themselves; otherwise the trainer packs them. With
    `points` the engine's parameters point to what was staged, with `into` nothing is staged and versions land in them;
    otherwise what was staged is copied into them, where they lie.
    """
    model = model_for(settings)
    # The largest chunks: each costs a message, and nothing waits for a page of host memory.
    options: dict[str, Any] = {
        "transport": "cuda_ipc",
        "expose": ["cuda_ipc"],
        "chunk_bytes": MAX_CHUNK_BYTES,
        "direct": direct,
    }
    state = {"device": device}
    phases: list[dict[str, float]] = []
    with ExitStack() as stack:
        receiver = {"device": device, "points": points, "into": into}
        ours = stack.enter_context(Link(mover, model, state, options, receiver_options=[receiver]))

        def move() -> float:
            moved = ours.move()
            phases.append(_list_phases(moved))
            if direct != ("hold_s" in phases[-1]):
                raise CaseError(f"engines read the trainer's parameters themselves is {not direct}, and not {direct}")
            return moved.seconds

        contestants = {"ours": move}
        if baseline is None:
            contestants["theirs"] = ours.copy
        else:
            theirs = stack.enter_context(Link(baseline, model, state))
            contestants["theirs"] = lambda: theirs.move().seconds
        times_s = take_turns(contestants, settings.rounds)
        note = f"carried by {', '.join(ours.transports())}, {num_bytes(model) / 1e9:.1f} GB"
    gbps = {name: [num_bytes(model) / 1e9 / s for s in values] for name, values in times_s.items()}
    details = {name: median(found[name] for found in phases[1:]) for name in phases[0]}
    details |= {f"{name}_s": median(values) for name, values in times_s.items()}
    return Reading(gbps["ours"], gbps["theirs"], "GB/s", note, details)


def _list_phases(move: Move) -> dict[str, float]:
    """Seconds of one version: `pack` at the source, `stage` and `check` of the engine, `load` into its parameters.

    `publish` is all of it as the trainer waits for it, until the engine says that it serves the version. `hold` is for
    how long the weights must stay as they are after `pack`, where engines read them themselves.
    """
    (sender,), (receiver,) = move.senders, move.receivers
    (engine,) = sender["engines"].values()
    held = {"hold_s": sender["phases_s"]["hold"]} if "hold" in sender["phases_s"] else {}
    return held | {
        "pack_s": sender["phases_s"]["pack"],
        "stage_s": engine["stage_s"],
        "check_s": engine["spans_s"].get("check", 0.0),
        "load_s": receiver["load_s"],
        "publish_s": sender["end_s"] - sender["start_s"],
    }


def measure_pass(settings: Settings, *, device: str = "cuda") -> Reading:
    """GB/s of weights that one pass copies and digests, next to a copy of the same tensors on the device.

    A model's tensors go into one block of memory, as a source packs them: one launch, one wait, no other process.
    """
    specs = MODELS[model_for(settings)]()
    chunks = lay_out_chunks(
        [spec.whole() for spec in specs], {spec.name: spec.dtype for spec in specs}, MAX_CHUNK_BYTES
    )
    tensors, spare = allocate(specs, device), allocate(specs, device)
    fill_normal(tensors, 1)
    there = torch.zeros(sum(chunk.num_bytes for chunk in chunks), dtype=torch.uint8, device=device)
    passes = ChunkPasses(chunks, {spec.name: spec.dtype for spec in specs}, torch.device(device))
    starts = accumulate((chunk.num_bytes for chunk in chunks), initial=0)
    placed = [
        (piece, start + piece.start_byte)
        for chunk, start in zip(chunks, starts, strict=False)
        for piece in chunk.pieces
    ]
    sources = [tensors[piece.region.name][piece.region.slices] for piece, _ in placed]
    raws = [there[start : start + piece.num_bytes] for piece, start in placed]
    targets = [raw.view(source.dtype).view(source.shape) for raw, source in zip(raws, sources, strict=True)]
    places = np.array([(*place_of(source), *place_of(target)) for source, target in zip(sources, targets, strict=True)])
    digests: dict[str, list[int]] = {}

    def run(name: str) -> float:
        start_s = _now(device)
        into = targets.__getitem__ if name == "pass" else None
        digests[name] = passes.launch(0, len(chunks), places, sources.__getitem__, into).digests()
        return len(there) / 1e9 / (_now(device) - start_s)

    def copy() -> float:
        start_s = _now(device)
        for name, tensor in tensors.items():
            spare[name].copy_(tensor)
        return len(there) / 1e9 / (_now(device) - start_s)

    contestants = {"pass": lambda: run("pass"), "digests_alone": lambda: run("digests_alone"), "copy": copy}
    gbps = take_turns(contestants, settings.rounds)
    wanted = as_digests([region_sum(source, piece.region) for source, (piece, _) in zip(sources, placed, strict=True)])
    if not all(torch.equal(*pair) for pair in zip(sources, targets, strict=True)):
        raise CaseError("one pass over the device's memory: what was copied is not what was there")
    if digests["pass"] != wanted or digests["digests_alone"] != wanted:
        raise CaseError("one pass over the device's memory: its digests are not those of torch")
    note = f"{len(there) / 1e9:.1f} GB, {len(placed)} pieces, {'Triton' if passes.runner else 'torch'}"
    return Reading(gbps["pass"], gbps["copy"], "GB/s", note, {"digests_alone_gbps": median(gbps["digests_alone"])})


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
