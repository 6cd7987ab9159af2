"""The delta codec's search on a GPU, as four Triton kernels: the same deltas as `delta_codec` finds.

    found = find_deltas([(base, new), ...], max_bytes, both=True)     # flat CUDA tensors; None for one that takes more

What bounds it is reading both states once. `mark` does that, and writes one bit an element and a few counts a tile;
everything after works on the bits, a sixteenth of a bf16 tensor, and on what changed:

    mark        the bits; in each tile, how many are set, and how many are exceptions on the way there and back
    place       from the bits: each changed element's position, what lay and what lies there
    measure     of each change: how many gap bytes lead to it, whether it is an exception there and back
    write       the parts of the deltas, at places that a running sum of the measures gives

The host waits twice for however many tensors: for the counts of all, and for the parts of all, which come in one copy a
tensor to pinned memory. Every launch costs it some 30 us, which the device does not wait for while there is another
tensor to mark. Triton comes with torch for CUDA and is imported with this module alone; `delta_torch` does without.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import triton

from weightcast.sync import delta_triton_kernels as kernels
from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, SKIP, Delta

Found: TypeAlias = tuple[Delta, Delta | None]

_TILE = 4096
_TILE_WORDS = _TILE // 32
# What one program of `place` and of the kernels after it works on.
_WORDS, _CHANGES = 1024, 1024
# Each part begins where every dtype may be viewed.
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Marked:
    """One tensor's two states, the bits that say where they differ, and the running sum of the tiles' counts."""

    base: torch.Tensor
    new: torch.Tensor
    words: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Counts:
    """What is to be found."""

    changes: int
    there: int
    back: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """Sizes in bytes of the parts of a delta and of the one back, and their host memory, once the device is done."""

    sizes: tuple[int, ...]
    host: torch.Tensor


def find_deltas(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], max_bytes: int, *, both: bool
) -> list[Found | None]:
    """Of each pair the delta from its first to its second, and with `both` the one back.

    None for a pair whose delta takes more than `max_bytes`. Flat contiguous tensors, those of a pair of one signed
    integer dtype and length, all on one device. The parts lie in pinned host memory.
    """
    if not pairs:
        return []
    with _on(pairs[0][0].device):
        marked = [_find_marks(base, new) for base, new in pairs]
        counts = _read_counts(marked)
        parts = [
            _make_parts(one, count, both=both) if _least_bytes(one, count) <= max_bytes else None
            for one, count in zip(marked, counts, strict=True)
        ]
        if pairs[0][0].device.type == "cuda":
            torch.cuda.current_stream().synchronize()
    found = [
        None if part is None else _read_deltas(one.base, part, both=both)
        for one, part in zip(marked, parts, strict=True)
    ]
    return [one if one is not None and one[0].num_bytes <= max_bytes else None for one in found]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _find_marks(base: torch.Tensor, new: torch.Tensor) -> _Marked:
    num_tiles = triton.cdiv(len(base), _TILE)
    words = torch.empty(num_tiles * _TILE_WORDS, dtype=torch.int32, device=base.device)
    counts = torch.empty(3 * num_tiles, dtype=torch.int32, device=base.device)
    if num_tiles:
        bits = 8 * base.element_size()
        kernels.mark[(num_tiles,)](base, new, words, counts, num_elements=len(base), BITS=bits, TILE=_TILE, num_warps=8)
    return _Marked(base, new, words, torch.cumsum(counts, 0))


def _read_counts(marked: Sequence[_Marked]) -> list[_Counts]:
    """Waits for the device, once."""
    full = [one.ends[len(one.ends) // 3 - 1 :: len(one.ends) // 3] for one in marked if len(one.ends)]
    rows = iter(torch.stack(full).tolist() if full else [])
    ends = [next(rows) if len(one.ends) else (0, 0, 0) for one in marked]
    return [_Counts(changes, there - changes, back - there) for changes, there, back in ends]


def _least_bytes(marked: _Marked, counts: _Counts) -> int:
    """Of the delta there: a gap byte and a low byte a change, and the exceptions."""
    return HEADER_BYTES + 2 * counts.changes + counts.there * (marked.base.element_size() + 4)


def _make_parts(marked: _Marked, counts: _Counts, *, both: bool) -> _Parts:
    """Queue everything up to the copy to the host. Gap bytes are as many as they can be, and their number is first."""
    base, count = marked.base, counts.changes
    itemsize, device = base.element_size(), base.device
    sizes = [8, count + len(base) // SKIP, counts.there * itemsize, counts.there * 4, count]
    sizes += [counts.back * itemsize, counts.back * 4, count] if both else [0, 0, 0]
    starts = _starts(sizes)
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    if not count:
        host.zero_()
        return _Parts(tuple(sizes), host)
    positions = torch.empty(count, dtype=torch.int64, device=device)
    lay, lies = base.new_empty(count), base.new_empty(count)
    num_words = len(marked.words)
    kernels.place[(triton.cdiv(num_words, _WORDS),)](
        *(base, marked.new, marked.words, marked.ends, positions, lay, lies),
        num_words=num_words,
        TILE_WORDS=_TILE_WORDS,
        WORDS=_WORDS,
    )
    grid, options = (triton.cdiv(count, _CHANGES),), {"SKIP": SKIP, "BITS": 8 * itemsize, "CHANGES": _CHANGES}
    # One row each: gap bytes, exceptions there, exceptions back; summed as one, which a device does fastest.
    measures = torch.empty(3 * count, dtype=torch.int64, device=device)
    kernels.measure[grid](positions, lay, lies, measures, num_changes=count, **options)
    room = torch.full((starts[-1],), SKIP, dtype=torch.uint8, device=device)
    dtypes = [torch.int64, torch.uint8, *(base.dtype, torch.int32, torch.uint8) * 2]
    views = [room[start : start + size].view(dtype) for start, size, dtype in zip(starts, sizes, dtypes, strict=False)]
    kernels.write[grid](
        positions, lay, lies, torch.cumsum(measures, 0), *views, num_changes=count, BOTH=both, **options
    )
    host.copy_(room, non_blocking=True)
    return _Parts(tuple(sizes), host)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and where the last one ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
    return starts


def _read_deltas(base: torch.Tensor, parts: _Parts, *, both: bool) -> Found:
    array = parts.host.numpy()
    cut = [array[start : start + size] for start, size in zip(_starts(parts.sizes), parts.sizes, strict=False)]
    gaps = cut[1][: int(cut[0].view(np.int64)[0])]
    itemsize = base.element_size()

    def make(values: Any, ordinals: Any, low: Any) -> Delta:
        return Delta(itemsize, len(base), values.view(ELEMENT_TYPES[itemsize]), ordinals.view(np.uint32), gaps, low)

    return make(*cut[2:5]), make(*cut[5:8]) if both else None
