"""Boxes of a model in a file without a name, to be handed to another process: they do not fit a packet.

    with open_boxes(specs, wanted) as descriptor:
        connection.send("join", Join(...), descriptor)
    wanted = read_boxes(descriptor, specs)               # elsewhere; `WireError` for anything else than boxes of these

Tensors are in the order of their names, so both ends need the same model and no names are sent.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from weightcast.sync import schema
from weightcast.sync.errors import ModelMismatch, WireError
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.schema import MAX_DIMENSIONS, checked, many, record, uint
from weightcast.sync.wanted import WantedRegions, check_wanted

MAX_BYTES = 64 << 20
_KIND = "boxes"
_SIZES = many(uint(1 << 62), MAX_DIMENSIONS)


@dataclass(frozen=True, slots=True)
class _Box:
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _BoxTable:
    tensors: tuple[tuple[_Box, ...], ...] = checked(many(many(record(_Box, _SIZES, _SIZES))))


@contextmanager
def open_boxes(specs: Iterable[TensorSpec], wanted: WantedRegions) -> Iterator[int]:
    """The descriptor of such a file, for as long as the block lasts. `WireError` for more than `MAX_BYTES`."""
    names = sorted(spec.name for spec in specs)
    table = _BoxTable(tuple(tuple(_Box(box.offset, box.shape) for box in wanted[name]) for name in names))
    raw = schema.pack(_KIND, table)
    if len(raw) > MAX_BYTES:
        raise WireError(
            f"the wanted boxes take {len(raw)} bytes, at most {MAX_BYTES} are handed over; want fewer boxes"
        )
    descriptor = os.memfd_create("weightcast-boxes", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(raw)
        yield descriptor
    finally:
        os.close(descriptor)


def read_boxes(descriptor: int, specs: Iterable[TensorSpec]) -> WantedRegions:
    """The boxes in such a file, which must be boxes of `specs`. `descriptor` stays open."""
    specs = tuple(specs)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_BYTES:
        raise WireError(f"what was handed over is no file of boxes, or has more than {MAX_BYTES} bytes")
    table = schema.unpack(os.pread(descriptor, info.st_size, 0), {_KIND: _BoxTable})
    names = sorted(spec.name for spec in specs)
    if len(table.tensors) != len(names):
        raise WireError(f"boxes of {len(table.tensors)} tensors were handed over, the model has {len(names)}")
    wanted = {
        name: tuple(Region(name, box.offset, box.shape) for box in boxes)
        for name, boxes in zip(names, table.tensors, strict=True)
    }
    try:
        check_wanted(wanted, specs)
    except (ModelMismatch, ValueError) as error:
        raise WireError(f"boxes that were handed over: {error}") from None
    return wanted
