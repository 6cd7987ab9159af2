"""Digests: their speed on one core, alone and in the same pass as a copy, next to a plain copy of the same bytes.

The model is bf16 with rows of 8 KiB. Chunks of 4 MiB are what a receiver lands: hashed, then copied to their places
with their digests. Every round compares all digests, and the last one what was copied.
"""

import statistics
import time
from collections.abc import Callable

import torch
import xxhash
from harness import Record

from weightcast.sync.digest import add_digests, copy_with_digest, region_digest
from weightcast.sync.digest_kernel import NUMPY, available_levels
from weightcast.sync.regions import Region

ROW_ELEMENTS = 4096
CHUNK_ROWS = 512


class Bench:
    """A matrix, the place where copies of it go, and one method a case that returns the matrix's digest."""

    def __init__(self, num_chunks: int) -> None:
        shape = (num_chunks * CHUNK_ROWS, ROW_ELEMENTS)
        self.source = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16)
        self.target = torch.ones_like(self.source)
        self.region = Region("w", (0, 0), shape)
        self.digest = region_digest(self.source, self.region)

    def memcpy(self) -> int:
        self.target.copy_(self.source)
        return self.digest

    def digest_alone(self, level: str | None = None) -> int:
        return region_digest(self.source, self.region, level=level)

    def copy_then_digest(self) -> int:
        self.target.copy_(self.source)
        return region_digest(self.target, self.region)

    def fused(self, level: str | None = None) -> int:
        return copy_with_digest(self.target, self.source, self.region, level=level)

    def land_chunks(self) -> int:
        """As a receiver does: each chunk hashed, then copied to its place with its digest."""
        digests = []
        for start in range(0, len(self.source), CHUNK_ROWS):
            chunk = self.source[start : start + CHUNK_ROWS]
            xxhash.xxh3_128_digest(chunk.numpy().data)
            region = Region("w", (start, 0), tuple(chunk.shape))
            digests.append(copy_with_digest(self.target[start : start + CHUNK_ROWS], chunk, region))
        return add_digests(*digests)


def run_digest(rounds: int, tiny: bool) -> list[Record]:
    """GB/s of each case over all rounds, interleaved."""
    bench = Bench(num_chunks=4 if tiny else 128)
    cases: dict[str, Callable[[], int]] = {
        "memcpy": bench.memcpy,
        "digest_gbps": bench.digest_alone,
        "digest_gbps_numpy": lambda: bench.digest_alone(NUMPY),
        "copy_then_digest_gbps": bench.copy_then_digest,
        "copy_with_digest_gbps": bench.fused,
        "land_chunks_gbps": bench.land_chunks,
    }
    for level in available_levels()[1:-1]:
        cases[f"copy_with_digest_gbps_{level}"] = lambda level=level: bench.fused(level)  # type: ignore[misc]
    gb = bench.source.numel() * bench.source.element_size() / 1e9
    gbps: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, run in cases.items():
            start_s = time.perf_counter()
            found = run()
            gbps[case].append(gb / (time.perf_counter() - start_s))
            if found != bench.digest:
                raise SystemExit(f"{case}: a wrong digest")
    if not torch.equal(bench.source, bench.target):
        raise SystemExit("copy with digest: what was copied is not what was there")
    copy_gbps = statistics.median(gbps.pop("memcpy"))
    note = f"one core, bf16, rows of 8 KiB; the fastest level is {available_levels()[-1]}"
    medians = {case: statistics.median(values) for case, values in gbps.items()}
    return [
        Record(case, value, "GB/s", "memcpy", copy_gbps, value / copy_gbps, rounds, note)
        for case, value in medians.items()
    ]
