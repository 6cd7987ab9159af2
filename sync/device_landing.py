"""How the chunks of one source come to the tensors of an engine's GPU: tables that stay from version to version.

landing = LandingPasses(layout, specs, strides, device)
places = landing.places(first, count, came, addresses)      # `addresses` of tensors, in the order of specs
landing.passes.launch(first, count, places, find_source, find_target)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from weightcast.sync.chunks import Piece
from weightcast.sync.device_passes import ChunkPasses
from weightcast.sync.layout import SourceLayout
from weightcast.sync.pass_plan import PLACE_FIELDS, Int64Array, find_stride
from weightcast.sync.regions import TensorSpec
from weightcast.sync.scattered import ScatteredBytes


class RunningRun(Protocol):
    """Chunks that are being brought to their places."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to wait for."""
        ...

    def digests(self) -> list[int]:
        """Of each piece; when this returns all are in their places. Once only."""
        ...

    def wait(self) -> None:
        """Until all are in their places."""
        ...


@dataclass(frozen=True, slots=True)
class RunLanding:
    """Whole chunks, neighbours, on their way to their places in the memory of `owner`, a staging."""

    owner: object
    running: RunningRun
    num_bytes: int

    def __len__(self) -> int:
        return self.num_bytes


class LandingPasses:
    """See the module. `specs` are those of the tensors, `strides` theirs in elements."""

    def __init__(
        self,
        layout: SourceLayout,
        specs: Sequence[TensorSpec],
        strides: Sequence[tuple[int, ...]],
        device: torch.device,
    ) -> None:
        self._start_bytes = layout.start_bytes
        self.pieces = tuple((chunk.index, piece) for chunk in layout.chunks for piece in chunk.pieces)
        """(chunk, piece), in order."""
        self.passes = ChunkPasses(layout.chunks, {spec.name: spec.dtype for spec in specs}, device)
        numbers = {spec.name: number for number, spec in enumerate(specs)}
        self._tensors = np.array([numbers[piece.region.name] for _, piece in self.pieces], np.int64)
        self._owners: list[int] = self._tensors.tolist()
        rows = [
            (layout.start_bytes[index] + piece.start_byte, lanes, *_place_in(specs[number], strides[number], piece))
            for (index, piece), lanes, number in zip(self.pieces, self.passes.row_lanes, self._tensors, strict=True)
        ]
        # (first byte in the source's memory, lanes of a row there, first byte in the tensor, lanes from row to row)
        self._offsets = np.array(rows, np.int64).reshape(-1, PLACE_FIELDS)
        self._shapes = np.array([(shape.num_rows, shape.row_bytes) for shape in self.passes.shapes], np.int64).reshape(
            -1, 2
        )

    def owners(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Of a run: where each chunk's pieces begin among its own, and where the last ones end; each one's tensor."""
        firsts = self.passes.first_pieces[first : first + count + 1]
        return [number - firsts[0] for number in firsts], self._owners[firsts[0] : firsts[-1]]

    def places(self, first: int, count: int, came: torch.Tensor | ScatteredBytes, addresses: Int64Array) -> Int64Array:
        """Of the pieces of a run, out of its bytes in `came`, into tensors at `addresses`, for `launch`."""
        span = self.passes.span(first, count)
        places = self._offsets[span].copy()
        is_placed = places[:, 3] >= 0
        if isinstance(came, ScatteredBytes):
            places[:, :2] = came.locate(places[:, 0], *self._shapes[span].T)
        else:
            places[:, 0] += came.data_ptr() - self._start_bytes[first]
        places[:, 2] += addresses[self._tensors[span]]
        places[~is_placed] = 0
        return places


def _place_in(spec: TensorSpec, strides: tuple[int, ...], piece: Piece) -> tuple[int, int]:
    """(first byte, lanes from row to row) of a piece in its tensor; lanes of -1 where there is no such number."""
    start = sum(at * step for at, step in zip(piece.region.offset, strides, strict=True))
    stride = find_stride(piece.region.shape, strides, spec.dtype.itemsize)
    return start * spec.dtype.itemsize, -1 if stride is None else stride
