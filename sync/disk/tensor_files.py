"""Safetensors files made from buffers that are there already: a header, then the buffers one after the other.

The library's own writer wants whole tensors of one dtype; here an entry is any bytes with a name, a dtype and a shape,
so that a source's host copy and its deltas are written without a copy.

    laid_out = lay_out_file([Entry("model.norm.weight", torch.bfloat16, (512,), buffer), ...])
    store.write(folder, name, laid_out.buffers)
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from weightcast.sync.checkpoint_files import HEADER_DTYPES

Buffer: TypeAlias = "bytes | memoryview"
# Readers map files into memory and view them in place.
_ALIGNMENT_BYTES = 8
_NAMES = {dtype: name for name, dtype in HEADER_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: `data` has exactly the bytes of `shape` elements of `dtype`, in C order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Buffer


@dataclass(frozen=True, slots=True)
class LaidOutFile:
    """A file's bytes as buffers, header first, and where the data of each entry begins in it (by the order given)."""

    buffers: tuple[Buffer, ...]
    starts: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A file's header, the order in which its tensors follow, and where each begins in the file (as given)."""

    head: bytes
    order: tuple[int, ...]
    starts: tuple[int, ...]
    num_bytes: int


def lay_out_header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> Layout:
    """Lay out tensors, whose names differ. Wide elements come first, so that every tensor is aligned."""
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index][1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[int, int] = {}
    end = 0
    for index in order:
        name, dtype, shape = tensors[index]
        places[index] = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [places[index], end]}
    assert len(header) == len(tensors) + 1, "two tensors have one name"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    head = len(text).to_bytes(8, "little") + text
    starts = tuple(len(head) + places[index] for index in range(len(tensors)))
    return Layout(head, tuple(order), starts, len(head) + end)


def lay_out_file(entries: Sequence[Entry]) -> LaidOutFile:
    """Lay out `entries`, whose names differ."""
    layout = lay_out_header([(entry.name, entry.dtype, entry.shape) for entry in entries])
    for entry in entries:
        assert len(entry.data) == math.prod(entry.shape) * entry.dtype.itemsize, (entry.name, len(entry.data))
    buffers = (layout.head, *(entries[index].data for index in layout.order))
    return LaidOutFile(buffers, layout.starts, layout.num_bytes)


def group_by_bytes(sizes: Sequence[int], limit_bytes: int) -> Iterator[range]:
    """Cut a sequence into runs of at most `limit_bytes` each, or of one item that is larger."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit_bytes:
            yield range(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))
