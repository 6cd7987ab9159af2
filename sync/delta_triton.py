"""The delta codec's search on a GPU, as four Triton kernels: the same deltas as `delta_codec` finds.

    found = find_deltas(base, new, max_bytes, both=True)      # flat CUDA tensors; None when it would take more

What bounds it is reading both states once. `_mark` does that, and writes one bit an element and one count a tile;
everything after works on the bits, a sixteenth of a bf16 tensor, and on what changed:

    _mark       the bits, and how many are set in each tile
    _place      from the bits: each changed element's position, what lay and what lies there
    _measure    of each change: how many gap bytes lead to it, whether it is an exception on the way there and back
    _write      the parts of the deltas, at places that a running sum of the measures gives

The host waits three times: for the number of changes, for the parts' sizes, and for the parts, which come in one copy
to pinned memory. Triton comes with torch for CUDA and is imported with this module alone; `delta_torch` does without.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, SKIP, Delta

_TILE = 4096
_CHANGES_A_PROGRAM = 1024
# Each part begins where every dtype may be viewed.
_ALIGNMENT_BYTES = 8


# Whatever the numbers are, a kernel is compiled once a dtype: no later step of a trainer may wait for a compiler.


@triton.jit(do_not_specialize=["num_elements"])
def _mark(base, new, words, counts, num_elements, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tl.program_id(0).to(tl.int64)
    places = tile * TILE + tl.arange(0, TILE)
    inside = places < num_elements
    differs = tl.load(base + places, mask=inside, other=0) != tl.load(new + places, mask=inside, other=0)
    is_changed = differs.to(tl.int32)
    bits = tl.reshape(is_changed, (TILE // 32, 32)) << tl.arange(0, 32)[None, :]
    tl.store(words + tile * (TILE // 32) + tl.arange(0, TILE // 32), tl.sum(bits, 1))
    tl.store(counts + tile, tl.sum(is_changed, 0))


@triton.jit
def _place(base, new, words, ends, positions, lay, lies, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    word = tl.load(words + tile * (TILE // 32) + lanes // 32)
    is_changed = (word >> (lanes % 32)) & 1
    # `ends` counts the changes up to and with this tile.
    rank = tl.load(ends + tile) - tl.sum(is_changed, 0) + tl.cumsum(is_changed, 0) - 1
    places = tile * TILE + lanes
    is_here = is_changed != 0
    tl.store(positions + rank, places, mask=is_here)
    tl.store(lay + rank, tl.load(base + places, mask=is_here), mask=is_here)
    tl.store(lies + rank, tl.load(new + places, mask=is_here), mask=is_here)


@triton.jit(do_not_specialize=["num_changes"])
def _measure(  # type: ignore[no-untyped-def]
    positions, lay, lies, measures, num_changes, SKIP: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr
):
    change = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = change < num_changes
    here = tl.load(positions + change, mask=inside, other=0)
    before = tl.load(positions + change - 1, mask=inside & (change > 0), other=-1)
    tl.store(measures + change, (here - before - 1) // SKIP + 1, mask=inside)
    old = tl.load(lay + change, mask=inside, other=0).to(tl.int64)
    new = tl.load(lies + change, mask=inside, other=0).to(tl.int64)
    # The step wraps around in the element's own size, as the receiver's does; one of a byte always fits a byte.
    step = ((new - old) << (64 - BITS)) >> (64 - BITS)
    is_exception = ((step < -128) | (step > 127)) & (BITS > 8)
    is_back = ((step <= -128) | (step > 128)) & (BITS > 8)
    tl.store(measures + num_changes + change, is_exception.to(tl.int64), mask=inside)
    tl.store(measures + 2 * num_changes + change, is_back.to(tl.int64), mask=inside)


@triton.jit(
    do_not_specialize=["end_before", "num_changes"],
    do_not_specialize_on_alignment=["lies", "measures", "ends", "values", "ordinals", "low"],
)
def _write(  # type: ignore[no-untyped-def]
    lies, measures, ends, end_before, values, ordinals, low, num_changes, TILE: tl.constexpr
):
    change = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = change < num_changes
    new = tl.load(lies + change, mask=inside, other=0)
    tl.store(low + change, (new.to(tl.int64) & 255).to(tl.uint8), mask=inside)
    is_exception = inside & (tl.load(measures + change, mask=inside, other=0) != 0)
    place = tl.load(ends + change, mask=inside, other=1) - 1 - end_before
    tl.store(values + place, new, mask=is_exception)
    tl.store(ordinals + place, change.to(tl.int32), mask=is_exception)


@triton.jit(do_not_specialize=["num_changes"])
def _write_gaps(positions, ends, gaps, num_changes, SKIP: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    change = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = change < num_changes
    here = tl.load(positions + change, mask=inside, other=0)
    before = tl.load(positions + change - 1, mask=inside & (change > 0), other=-1)
    end = tl.load(ends + change, mask=inside, other=1)
    tl.store(gaps + end - 1, ((here - before - 1) % SKIP).to(tl.uint8), mask=inside)


def find_deltas(
    base: torch.Tensor, new: torch.Tensor, max_bytes: int, *, both: bool
) -> tuple[Delta, Delta | None] | None:
    """The delta from `base` to `new`, and with `both` the one back; None when the first takes over `max_bytes`.

    Flat contiguous tensors of one signed integer dtype, length and device. The parts lie in pinned host memory.
    """
    with _on(base.device):
        changes = _find_changes(base, new, max_bytes)
        if changes is None:
            return None
        return _make_deltas(base, *changes, max_bytes=max_bytes, both=both)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _find_changes(
    base: torch.Tensor, new: torch.Tensor, max_bytes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Positions, what lay and what lies there; None when so many cannot fit."""
    num_elements, device = len(base), base.device
    num_tiles = triton.cdiv(num_elements, _TILE)
    words = torch.empty(num_tiles * _TILE // 32, dtype=torch.int32, device=device)
    counts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    if num_tiles:
        _mark[(num_tiles,)](base, new, words, counts, num_elements, TILE=_TILE, num_warps=8)
    ends = torch.cumsum(counts, 0)
    num_changes = int(ends[-1]) if num_tiles else 0
    if HEADER_BYTES + 2 * num_changes > max_bytes:
        return None
    positions = torch.empty(num_changes, dtype=torch.int64, device=device)
    lay, lies = base.new_empty(num_changes), base.new_empty(num_changes)
    if num_changes:
        _place[(num_tiles,)](base, new, words, ends, positions, lay, lies, TILE=_TILE, num_warps=8)
    return positions, lay, lies


def _make_deltas(
    base: torch.Tensor,
    positions: torch.Tensor,
    lay: torch.Tensor,
    lies: torch.Tensor,
    *,
    max_bytes: int,
    both: bool,
) -> tuple[Delta, Delta | None] | None:
    itemsize, count = base.element_size(), len(positions)
    if not count:
        empty = _delta(base, *(np.empty(0, np.uint8) for _ in range(4)))
        return (empty, empty if both else None) if empty.num_bytes <= max_bytes else None
    grid = (triton.cdiv(count, _CHANGES_A_PROGRAM),)
    # One row each: gap bytes, exceptions there, exceptions back; summed as one, which a device does fastest.
    measures = torch.empty(3 * count, dtype=torch.int64, device=base.device)
    _measure[grid](positions, lay, lies, measures, count, SKIP=SKIP, BITS=8 * itemsize, TILE=_CHANGES_A_PROGRAM)
    ends = torch.cumsum(measures, 0)
    num_gaps, end_there, end_back = ends[count - 1 :: count].tolist()
    num_there, num_back = end_there - num_gaps, end_back - end_there
    if HEADER_BYTES + num_there * (itemsize + 4) + num_gaps + count > max_bytes:
        return None
    sizes = [num_gaps, num_there * itemsize, num_there * 4, count]
    sizes += [num_back * itemsize, num_back * 4, count] if both else []
    room, views = _make_room(sizes, base.device)
    room[:num_gaps] = SKIP
    _write_gaps[grid](positions, ends, views[0], count, SKIP=SKIP, TILE=_CHANGES_A_PROGRAM)
    for row, (elements, before) in enumerate([(lies, num_gaps), (lay, end_there)][: 1 + both], 1):
        values, ordinals, low = views[3 * row - 2 : 3 * row + 1]
        own = slice(row * count, (row + 1) * count)
        _write[grid](
            *(elements, measures[own], ends[own], before, values.view(base.dtype), ordinals.view(torch.int32), low),
            num_changes=count,
            TILE=_CHANGES_A_PROGRAM,
        )
    parts = _to_host(room, sizes)
    there = _delta(base, parts[0], *parts[1:4])
    return there, _delta(base, parts[0], *parts[4:7]) if both else None


def _delta(base: torch.Tensor, gaps: Any, values: Any, ordinals: Any, low: Any) -> Delta:
    itemsize = base.element_size()
    return Delta(itemsize, len(base), values.view(ELEMENT_TYPES[itemsize]), ordinals.view(np.uint32), gaps, low)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and where the last one ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
    return starts


def _make_room(sizes: Sequence[int], device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    starts = _starts(sizes)
    room = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    return room, [room[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _to_host(room: torch.Tensor, sizes: Sequence[int]) -> list[Any]:
    """The parts as arrays of host memory; waits for the device."""
    host = room
    if room.device.type == "cuda":
        host = torch.empty(room.shape, dtype=room.dtype, pin_memory=True)
        host.copy_(room, non_blocking=True)
        torch.cuda.current_stream(room.device).synchronize()
    array = host.numpy()
    return [array[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=False)]
