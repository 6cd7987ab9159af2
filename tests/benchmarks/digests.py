"""Cases of parts, on one core: digests alone and in the pass of a copy, and the reading of a source's shared memory.

The model is bf16 with rows of 8 KiB. Chunks of 4 MiB are what a receiver lands: hashed, then copied to their places
with their digests. Every round compares the digest, and what was copied.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import xxhash
from measure import take_turns
from records import CaseError, Reading, Settings

from weightcast.sync.digest import add_digests, copy_with_digest, region_digest
from weightcast.sync.digest_kernel import NUMPY
from weightcast.sync.host.arena import as_tensor
from weightcast.sync.regions import Region
from weightcast.sync.transports.base import Reach
from weightcast.sync.transports.shared_memory import expose, reach

ROW_ELEMENTS = 4096
CHUNK_ROWS = 512
TIMEOUT_S = 60.0


def measure_digest(settings: Settings, *, what: str) -> Reading:
    """GB/s of one of `WAYS`, next to a copy of the same bytes."""
    source, target, region = _make_matrix(settings)
    digest = region_digest(source, region)

    def run() -> float:
        target.zero_()
        start_s = time.perf_counter()
        found = WAYS[what](target, source, region)
        seconds = time.perf_counter() - start_s
        if found != digest or (what in COPYING and not torch.equal(target, source)):
            raise CaseError(f"{what}: a wrong digest, or not what was there")
        return source.nbytes / 1e9 / seconds

    gbps = take_turns({"ours": run, "copy": lambda: source.nbytes / 1e9 / _time_copy(target, source)}, settings.rounds)
    return Reading(gbps["ours"], gbps["copy"], "GB/s", "one core, bf16, rows of 8 KiB")


def measure_read(settings: Settings) -> Reading:
    """GB/s of a version that is read through a mapping of one's own with its digest, next to a plain copy.

    Opening the memory, which maps every page, comes once for all versions; `open_s` is what it takes.
    """
    source, target, region = _make_matrix(settings)
    exposed = expose(source.nbytes)
    as_tensor(exposed.memory).copy_(source.view(torch.uint8).view(-1))
    start_s = time.perf_counter()
    memory = reach(exposed.ticket, TIMEOUT_S)
    open_s = time.perf_counter() - start_s
    try:
        gbps = _race_read(settings, memory, source, target, region)
    finally:
        memory.close()
        exposed.close()
    note = f"{source.nbytes / 1e9:.2f} GB, one core; opened in {open_s * 1000:.0f} ms, once a source"
    return Reading(gbps["read"], gbps["copy"], "GB/s", note, {"open_s": open_s})


def _race_read(
    settings: Settings, memory: Reach, source: torch.Tensor, target: torch.Tensor, region: Region
) -> dict[str, list[float]]:
    digest = region_digest(source, region)
    raw = memory.view(0, source.nbytes)
    assert raw is not None, "shared memory is mapped"
    mapped = as_tensor(raw).view(target.dtype).view(target.shape)

    def read() -> float:
        target.zero_()
        start_s = time.perf_counter()
        found = _copy_chunks(target, mapped, region)
        seconds = time.perf_counter() - start_s
        if found != digest or not torch.equal(target, source):
            raise CaseError("shared memory: what was read is not what was written")
        return source.nbytes / 1e9 / seconds

    contestants = {"read": read, "copy": lambda: source.nbytes / 1e9 / _time_copy(target, source)}
    return take_turns(contestants, settings.rounds)


def _make_matrix(settings: Settings) -> tuple[torch.Tensor, torch.Tensor, Region]:
    shape = ((4 if settings.quick else 128) * CHUNK_ROWS, ROW_ELEMENTS)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
    return source, torch.ones_like(source), Region("w", (0, 0), shape)


def _time_copy(target: torch.Tensor, source: torch.Tensor) -> float:
    start_s = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start_s


def _digest(target: torch.Tensor, source: torch.Tensor, region: Region, *, level: str | None = None) -> int:
    return region_digest(source, region, level=level)


def _copy_then_digest(target: torch.Tensor, source: torch.Tensor, region: Region) -> int:
    target.copy_(source)
    return region_digest(target, region)


def _copy_chunks(target: torch.Tensor, source: torch.Tensor, region: Region, *, with_hash: bool = False) -> int:
    """Chunk by chunk, as a receiver does."""
    digests = []
    for start in range(0, len(source), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        if with_hash:
            xxhash.xxh3_128_digest(source[rows].numpy().data)
        part = Region(region.name, (start, 0), tuple(source[rows].shape))
        digests.append(copy_with_digest(target[rows], source[rows], part))
    return add_digests(*digests)


WAYS: Mapping[str, Callable[[torch.Tensor, torch.Tensor, Region], int]] = {
    "digest": _digest,
    "digest_numpy": partial(_digest, level=NUMPY),
    "copy_then_digest": _copy_then_digest,
    "copy_with_digest": copy_with_digest,
    "land_chunks": partial(_copy_chunks, with_hash=True),
}
COPYING = ("copy_then_digest", "copy_with_digest", "land_chunks")
