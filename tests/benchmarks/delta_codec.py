"""The delta codec: bytes against dense, and its speed on one core, over weights that an optimizer step has changed.

Masters in fp32 take a step of a size that changes the wanted share of their bf16 roundings; most change by one unit,
as in training. Every round decodes what it encoded and compares all bits.
"""

import statistics
import time
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from harness import Record

from weightcast.sync.delta_codec import apply_delta, encode_delta
from weightcast.sync.delta_wire import pack_delta

CHUNK_ELEMENTS = 1 << 21
DENSITIES = {"008": 0.008, "023": 0.023, "066": 0.066}
# A step's sizes differ between weights; its scale is found by halving until the share fits this closely.
TOLERANCE = 0.002

Bits = npt.NDArray[np.uint16]


def round_to_bf16(weights: npt.NDArray[np.float32]) -> Bits:
    """The bf16 bits of fp32 numbers, to nearest even (they are no NaNs)."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_states(density: float, num_chunks: int, seed: int = 0) -> tuple[list[Bits], list[Bits]]:
    """Chunks of bf16 weights before and after a step that changes about `density` of them."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(0, 0.02, (num_chunks, CHUNK_ELEMENTS)).astype(np.float32)
    direction = generator.normal(0, 1, weights.shape).astype(np.float32)
    before = round_to_bf16(weights)
    low, high = 0.0, 1.0
    while True:
        scale = (low + high) / 2
        share = float(np.mean(round_to_bf16(weights[0] + np.float32(scale) * direction[0]) != before[0]))
        if abs(share - density) <= TOLERANCE * density:
            break
        low, high = (scale, high) if share < density else (low, scale)
    after = round_to_bf16(weights + np.float32(scale) * direction)
    return list(before), list(after)


def run_codec(rounds: int, tiny: bool) -> list[Record]:
    """Bytes and speed at three densities."""
    records: list[Record] = []
    for name, density in DENSITIES.items():
        before, after = make_states(density, num_chunks=2 if tiny else 64)
        records += _sizes(name, before, after)
        if name == "008":
            records += _speeds(rounds, before, after)
    return records


def _sizes(name: str, before: list[Bits], after: list[Bits]) -> list[Record]:
    dense_bytes = float(sum(chunk.nbytes for chunk in after))
    payloads = [_encode(base, new, None) for base, new in zip(before, after, strict=True)]
    packed = [pack_delta(payload, base) for payload, base in zip(payloads, before, strict=True)]
    changed = sum(int(np.count_nonzero(base != new)) for base, new in zip(before, after, strict=True))
    note = f"{changed / sum(map(len, after)):.4f} of the elements changed"
    records = []
    for case, parts in ((f"delta_bytes_{name}", payloads), (f"delta_bytes_{name}_z", packed)):
        num_bytes = float(sum(map(len, parts)))
        records.append(Record(case, num_bytes, "bytes", "dense", dense_bytes, dense_bytes / num_bytes, 1, note))
    return records


def _speeds(rounds: int, before: list[Bits], after: list[Bits]) -> list[Record]:
    """GB/s of dense bytes on one core: the compiled kernel, and numpy."""
    dense_gb = sum(chunk.nbytes for chunk in after) / 1e9
    scratch = [chunk.copy() for chunk in before]
    gbps: dict[str, list[float]] = {}
    for _ in range(rounds):
        for suffix, use_kernel in (("", True), ("_numpy", False)):
            times_s = [time.perf_counter()]
            payloads = [_encode(base, new, use_kernel) for base, new in zip(before, after, strict=True)]
            times_s.append(time.perf_counter())
            for chunk, base in zip(scratch, before, strict=True):
                np.copyto(chunk, base)
            times_s.append(time.perf_counter())
            for payload, chunk in zip(payloads, scratch, strict=True):
                apply_delta(payload, chunk, use_kernel=use_kernel)
            times_s.append(time.perf_counter())
            if not all(np.array_equal(*pair) for pair in zip(scratch, after, strict=True)):
                raise SystemExit("delta codec: what was applied is not what was encoded")
            cases = (f"delta_encode_gbps{suffix}", "copy", f"delta_apply_gbps{suffix}")
            for case, (start_s, end_s) in zip(cases, pairwise(times_s), strict=True):
                gbps.setdefault(case, []).append(dense_gb / (end_s - start_s))
    copy_gbps = statistics.median(gbps.pop("copy"))
    return [_speed(case, statistics.median(values), copy_gbps, rounds) for case, values in gbps.items()]


def _speed(case: str, gbps: float, copy_gbps: float, rounds: int) -> Record:
    return Record(case, gbps, "GB/s", "memcpy", copy_gbps, gbps, rounds, "of dense bytes, one core, 0.8 % changed")


def _encode(base: Bits, new: Bits, use_kernel: bool | None) -> bytes:
    payload = encode_delta(base, new, use_kernel=use_kernel)
    assert payload is not None, "without a limit there is always a payload"
    return payload
