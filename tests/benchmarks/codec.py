"""Cases of the delta codec by itself: bytes against dense, and its speed on one core.

Masters in fp32 take a step of a size that changes the wanted share of their bf16 roundings; most change by one unit,
as in training. What was encoded is applied, and all bits are compared.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from statistics import median

import numpy as np
import numpy.typing as npt
from baselines.sparse_int32 import SparseInt32
from baselines.xor_zstd import XorZstd
from records import CaseError, Reading, Settings

from weightcast.sync.delta_codec import apply_delta, encode_delta
from weightcast.sync.delta_wire import pack_delta, unpack_delta

CHUNK_ELEMENTS = 1 << 21  # chunks of 4 MiB, as the publisher cuts them
# A step's sizes differ between weights; its scale is found by halving until the share fits this closely.
TOLERANCE = 0.002

Bits = npt.NDArray[np.uint16]
States = tuple[list[Bits], list[Bits]]


def round_to_bf16(weights: npt.NDArray[np.float32]) -> Bits:
    """The bf16 bits of fp32 numbers, to nearest even (they are no NaNs)."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@lru_cache(maxsize=1)
def make_states(density: float, num_chunks: int, seed: int) -> States:
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


def measure_bytes(settings: Settings, *, density: float, is_packed: bool) -> Reading:
    """Bytes of a delta, plain or with zstandard, against dense; every round has weights and a step of its own."""
    sizes: list[float] = []
    others: dict[str, list[float]] = {"sparse_int32": [], "xor_zstd": []}
    dense_bytes = 0.0
    for seed in range(settings.rounds):
        before, after = make_states(density, 2 if settings.quick else 16, seed)
        dense_bytes = float(sum(chunk.nbytes for chunk in after))
        sizes.append(float(sum(_size(base, new, is_packed) for base, new in zip(before, after, strict=True))))
        for name, codec in (("sparse_int32", SparseInt32()), ("xor_zstd", XorZstd())):
            payloads = [codec.encode(base, new) for base, new in zip(before, after, strict=True)]
            others[name].append(float(sum(map(len, payloads))))
    details = {f"{name}_ratio": dense_bytes / median(values) for name, values in others.items()}
    note = f"int32 positions {details['sparse_int32_ratio']:.0f}, dense XOR and zstd {details['xor_zstd_ratio']:.0f}"
    return Reading(sizes, [dense_bytes] * settings.rounds, "bytes", note, details)


def _size(base: Bits, new: Bits, is_packed: bool) -> int:
    payload = _encode(base, new, None)
    sent = pack_delta(payload, base) if is_packed else payload
    current = base.copy()
    apply_delta(unpack_delta(sent, current) if is_packed else sent, current)
    _compare([current], [new])
    return len(sent)


def measure_encode(settings: Settings, *, use_kernel: bool) -> Reading:
    """GB/s of dense bytes at 0.8 % changed, next to a copy of the same bytes."""
    before, after = make_states(0.008, 2 if settings.quick else 64, 0)
    scratch = [np.empty_like(chunk) for chunk in before]
    payloads: list[bytes] = []

    def encode() -> None:
        payloads[:] = [_encode(base, new, use_kernel) for base, new in zip(before, after, strict=True)]

    reading = _race_copy(settings, encode, before, scratch)
    for payload, chunk in zip(payloads, _copy(before, scratch), strict=True):
        apply_delta(payload, chunk)
    _compare(scratch, after)
    return reading


def measure_apply(settings: Settings, *, use_kernel: bool) -> Reading:
    """GB/s of dense bytes at 0.8 % changed, next to a copy of the same bytes; bits are compared in every round."""
    before, after = make_states(0.008, 2 if settings.quick else 64, 0)
    payloads = [_encode(base, new, None) for base, new in zip(before, after, strict=True)]
    current = [chunk.copy() for chunk in before]

    def apply() -> None:
        for payload, chunk in zip(payloads, current, strict=True):
            apply_delta(payload, chunk, use_kernel=use_kernel)

    # The copy of each round brings the old state back.
    return _race_copy(settings, apply, before, current, lambda: _compare(current, after))


def _race_copy(
    settings: Settings,
    run: Callable[[], None],
    source: list[Bits],
    target: list[Bits],
    check: Callable[[], None] = lambda: None,
) -> Reading:
    """`run` and the copy from `source` to `target`, one after the other in every round, the copy first."""
    dense_gb = sum(chunk.nbytes for chunk in source) / 1e9

    def round_of_both() -> tuple[float, float]:
        start_s = time.perf_counter()
        _copy(source, target)
        middle_s = time.perf_counter()
        run()
        end_s = time.perf_counter()
        check()
        return dense_gb / (end_s - middle_s), dense_gb / (middle_s - start_s)

    rounds = [round_of_both() for _ in range(settings.rounds + 1)][1:]
    values, copies = zip(*rounds, strict=True)
    return Reading(values, copies, "GB/s", "of dense bytes, one core, 0.8 % changed")


def _copy(source: list[Bits], target: list[Bits]) -> list[Bits]:
    for chunk, copy in zip(source, target, strict=True):
        np.copyto(copy, chunk)
    return target


def _compare(got: list[Bits], expected: list[Bits]) -> None:
    if not all(np.array_equal(*pair) for pair in zip(got, expected, strict=True)):
        raise CaseError("delta codec: what was applied is not what was encoded")


def _encode(base: Bits, new: Bits, use_kernel: bool | None) -> bytes:
    payload = encode_delta(base, new, use_kernel=use_kernel)
    assert payload is not None, "without a limit there is always a payload"
    return payload
