"""Writes a safetensors file block by block: the header from specs first, then any region of any tensor at its place.

The library's own `save_file` wants all tensors of a file in memory at once. The format is a length, a JSON header and
the tensors' bytes one after the other; the file is read back by the library before it is believed.

    with SafetensorsWriter(path, specs) as writer:
        writer.write(Region("model.norm.weight", (0,), (2048,)), tensor)
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from weightcast.sync.checkpoint_files import HEADER_DTYPES
from weightcast.sync.regions import Region, TensorSpec

# Names of dtypes in a safetensors header.
_NAMES = {dtype: name for name, dtype in HEADER_DTYPES.items()}
_ALIGNMENT_BYTES = 8


class SafetensorsWriter:
    """One file. Regions must span whole rows behind the dimension they are cut along, as `split_region` gives them."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._specs = {spec.name: spec for spec in specs}
        self._starts: dict[str, int] = {}
        end = 0
        # Wide elements first, so that every tensor is aligned.
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            self._starts[spec.name] = end
            end += spec.num_bytes
            places = [self._starts[spec.name], end]
            header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": places}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._first = self._file.tell()
        self._file.truncate(self._first + end)

    def write(self, region: Region, data: torch.Tensor) -> None:
        """Put `data`, of the region's shape and the tensor's dtype, in its place."""
        spec = self._specs[region.name]
        assert tuple(data.shape) == region.shape and data.dtype == spec.dtype, (region, data.shape, data.dtype)
        place, stride = 0, spec.dtype.itemsize
        for offset, size in zip(reversed(region.offset), reversed(spec.shape), strict=True):
            place += offset * stride
            stride *= size
        self._file.seek(self._first + self._starts[region.name] + place)
        raw: Any = data.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(raw)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
