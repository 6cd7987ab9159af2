"""How the chunks of one source come from memory that is read to the tensors of a host: by one call a run of chunks.

    landing = HostLanding(layout, tensors)           # or of a source whose bytes are scattered in its memory
    landing.takes(first, count)                      # whether the loops can walk over all of their pieces
    landing.run(first, count, there, addresses)      # `there`: the bytes of these chunks; the digest of each piece

Tables that stay from version to version, as those of `device_landing`; see `host_passes`.
"""

import weakref
from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch

from weightcast.sync.chunks import Piece
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.digest_kernel import can_take
from weightcast.sync.host_passes import HostPasses, list_strides
from weightcast.sync.host_pieces import HostPieces
from weightcast.sync.layout import SourceLayout
from weightcast.sync.pass_plan import Int64Array


class HostLanding:
    """See the module. The tensors are of the model's shapes, and every later version's have the same strides."""

    def __init__(
        self, layout: SourceLayout, tensors: Mapping[str, torch.Tensor], scattered: HostPieces | None = None
    ) -> None:
        # Not held: what a source shared would otherwise stay mapped here after everybody has let go of it.
        self._scattered = None if scattered is None else weakref.ref(scattered)
        self._start_bytes = np.array(layout.start_bytes, np.int64)
        self._first_pieces = tuple(accumulate((len(chunk.pieces) for chunk in layout.chunks), initial=0))
        pieces = [(chunk.index, piece) for chunk in layout.chunks for piece in chunk.pieces]
        numbers = {name: number for number, name in enumerate(tensors)}
        itemsizes = [tensors[piece.region.name].element_size() for _, piece in pieces]
        self._passes = HostPasses([piece.region for _, piece in pieces], itemsizes)
        self._owners: list[int] = [numbers[piece.region.name] for _, piece in pieces]
        self._tensors = np.array(self._owners, np.int64)
        self._sources = np.array([layout.start_bytes[index] + piece.start_byte for index, piece in pieces], np.int64)
        self._targets: Int64Array = np.zeros(len(pieces), np.int64)
        self._is_taken = np.ones(len(layout.chunks), np.bool_)
        for number, (index, piece) in enumerate(pieces):
            tensor = tensors[piece.region.name]
            strides = tensor.stride()
            place = self._locate(number, piece, scattered)
            if place is None:
                self._is_taken[index] = False
                continue
            self._sources[number], source_strides = place
            self._passes.place(number, source_strides, strides)
            start = sum(at * step for at, step in zip(piece.region.offset, strides, strict=True))
            self._targets[number] = start * tensor.element_size()
            self._is_taken[index] &= can_take(tensor)

    def owners(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Of a run: where each chunk's pieces begin among its own, and where the last ones end; each one's tensor."""
        firsts = self._first_pieces[first : first + count + 1]
        return [number - firsts[0] for number in firsts], self._owners[firsts[0] : firsts[-1]]

    def takes(self, first: int, count: int) -> bool:
        """Whether all pieces of these chunks can be brought to their places so."""
        return bool(self._is_taken[first : first + count].all())

    def is_of(self, scattered: HostPieces | None) -> bool:
        """Whether the tables are those of what is read now."""
        if scattered is None or self._scattered is None:
            return scattered is None and self._scattered is None
        return self._scattered() is scattered

    def _locate(self, number: int, piece: Piece, scattered: HostPieces | None) -> tuple[int, tuple[int, ...]] | None:
        """Where a piece begins, among the bytes of all chunks or, where they are scattered, in memory; its strides."""
        start, region = int(self._sources[number]), piece.region
        strides = list_strides(region.shape)
        if scattered is None:
            return start, strides
        row_elements = region.shape[-1] if region.shape else 1
        num_rows, itemsize = region.numel // row_elements, piece.num_bytes // region.numel
        place = scattered.locate(start, num_rows, row_elements * itemsize)
        if place is None or place[1] % itemsize:
            return None
        pitch = place[1] // itemsize if num_rows > 1 else row_elements
        return place[0], (*(stride // row_elements * pitch for stride in strides[:-1]), *strides[-1:])

    def run(self, first: int, count: int, there: ByteArray | HostPieces, addresses: Int64Array) -> list[int]:
        """Copy the pieces of chunks to tensors at `addresses`, in the order of `tensors`; the digest of each piece."""
        begin, end = self._first_pieces[first], self._first_pieces[first + count]
        sources = self._sources[begin:end]
        if not isinstance(there, HostPieces):
            start = int(self._start_bytes[first])
            assert len(there) == int(self._start_bytes[first + count]) - start
            sources = sources + (there.ctypes.data - start)
        targets = self._targets[begin:end] + addresses[self._tensors[begin:end]]
        found: list[int] = self._passes.run(begin, end, sources, targets, streams=True).tolist()
        return found
