"""Shared memory: reading a source's arena through a mapping of one's own, copied with its digest, next to a plain copy.

Chunks of 4 MiB of bf16, in rows of 8 KiB, on one core. Opening it, which maps every page, comes once for all versions.
"""

import statistics
import time

import numpy as np
import numpy.typing as npt
import torch
from digest import CHUNK_ROWS, ROW_ELEMENTS
from harness import Record

from weightcast.sync.digest import add_digests, copy_with_digest, region_digest
from weightcast.sync.host.arena import as_tensor
from weightcast.sync.regions import Region
from weightcast.sync.transports.shared_memory import expose, reach

TIMEOUT_S = 60.0


def run_shared_memory(rounds: int, tiny: bool) -> list[Record]:
    """Seconds to open, and GB/s of a version; each next to a copy of as many bytes in private memory."""
    shape = ((4 if tiny else 128) * CHUNK_ROWS, ROW_ELEMENTS)
    private = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16)
    target = torch.ones_like(private)
    num_bytes = private.numel() * private.element_size()
    exposed = expose(num_bytes)
    as_tensor(exposed.memory).copy_(private.view(torch.uint8).view(-1))
    digest = region_digest(private, Region("w", (0, 0), shape))
    times_s: dict[str, list[float]] = {"copy": [], "open": [], "read": []}
    for _ in range(rounds):
        marks_s = [time.perf_counter()]
        target.copy_(private)
        marks_s.append(time.perf_counter())
        memory = reach(exposed.ticket, TIMEOUT_S)
        marks_s.append(time.perf_counter())
        _read(memory.view(0, num_bytes), target)  # the first pass still fills the translation caches
        start_s = time.perf_counter()
        found = _read(memory.view(0, num_bytes), target)
        times_s["read"].append(time.perf_counter() - start_s)
        times_s["copy"].append(marks_s[1] - marks_s[0])
        times_s["open"].append(marks_s[2] - marks_s[1])
        memory.close()
        if found != digest or not torch.equal(target, private):
            raise SystemExit("shared memory: what was read is not what was written")
    exposed.close()
    copy_s, open_s, read_s = (statistics.median(times_s[case]) for case in ("copy", "open", "read"))
    gb = num_bytes / 1e9
    read_gbps, copy_gbps = gb / read_s, gb / copy_s
    note = f"{gb:.2f} GB, one core"
    return [
        Record("shared_memory_read_gbps", read_gbps, "GB/s", "memcpy", copy_gbps, read_gbps / copy_gbps, rounds, note),
        Record("shared_memory_open", open_s, "s", "memcpy", copy_s, open_s / copy_s, rounds, f"{note}, once a source"),
    ]


def _read(raw: npt.NDArray[np.uint8], target: torch.Tensor) -> int:
    source = as_tensor(raw).view(target.dtype).view(target.shape)
    digests = []
    for start in range(0, len(source), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        region = Region("w", (start, 0), tuple(source[rows].shape))
        digests.append(copy_with_digest(target[rows], source[rows], region))
    return add_digests(*digests)
