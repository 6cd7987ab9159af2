"""A source's pieces from where its weights lie to their chunks, by one call a run of chunks; see `host_passes`.

passes = PackingPasses(chunks, regions, dtypes, owners_of)
passes.run(first, count, arena, lives, sums, streams=True)      # `lives`: the live view of each region, by number
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.chunks import Chunk
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.digest import copy_with_digest
from weightcast.sync.digest_kernel import can_take
from weightcast.sync.host_passes import HostPasses, list_strides
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.piece_views import slices_within, view_piece
from weightcast.sync.regions import Region


class PackingPasses:
    """See the module. Chunks lie in the arena one after the other; `owners_of` is `find_owners`'s."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        regions: Sequence[Region],
        dtypes: Mapping[str, torch.dtype],
        owners_of: Sequence[tuple[int, ...]],
    ) -> None:
        self._dtypes, self._regions = dtypes, regions
        self._pieces = [piece for chunk in chunks for piece in chunk.pieces]
        self._firsts = tuple(accumulate((len(chunk.pieces) for chunk in chunks), initial=0))
        self._owners = np.array([owner for owners in owners_of for owner in owners], np.int64)
        itemsizes = [dtypes[piece.region.name].itemsize for piece in self._pieces]
        self._passes = HostPasses([piece.region for piece in self._pieces], itemsizes)
        self._strides: dict[int, tuple[int, ...]] = {}
        """Of the live view of each region that was taken."""
        self._inside: Int64Array = np.zeros(len(self._pieces), np.int64)
        """The first byte of each piece within the live view of its region."""
        starts = accumulate((chunk.num_bytes for chunk in chunks), initial=0)
        targets = [
            start + piece.start_byte for chunk, start in zip(chunks, starts, strict=False) for piece in chunk.pieces
        ]
        self._targets = np.array(targets, np.int64)

    def run(
        self,
        first: int,
        count: int,
        arena: ByteArray | None,
        lives: Mapping[int, torch.Tensor],
        sums: npt.NDArray[np.uint64],
        *,
        streams: bool,
    ) -> list[list[int]]:
        """Copy all pieces of chunks into the arena; the digests of each chunk's pieces, which are added to `sums`.

        What the loops cannot walk over (another device or dtype, strides within a row) is copied by torch. Without an
        arena nothing is copied, and they must be able to.
        """
        begin, end = self._firsts[first], self._firsts[first + count]
        owners = self._owners[begin:end]
        base = int(owners[0])
        addresses: Int64Array = np.zeros(int(owners[-1]) - base + 1, np.int64)
        for owner, live in lives.items():
            if self.can_take(owner, live):
                addresses[owner - base] = live.data_ptr()
        bases = addresses[owners - base]
        sources = np.where(bases == 0, 0, bases + self._inside[begin:end])
        targets = np.zeros(end - begin, np.int64) if arena is None else self._targets[begin:end] + arena.ctypes.data
        digests = self._passes.run(begin, end, sources, targets, streams=streams)
        for place in np.flatnonzero(sources == 0).tolist():
            assert arena is not None, "a live view that cannot be digested where it lies"
            digests[place] = self._copy(begin + place, arena, lives[int(owners[place])], reread=not streams)
        np.add.at(sums, owners, digests)
        found = digests.tolist()
        return [found[at - begin : to - begin] for at, to in pairwise(self._firsts[first : first + count + 1])]

    def can_take(self, owner: int, live: torch.Tensor) -> bool:
        """Whether the loops can walk over a live view; where its pieces begin in it is known then."""
        name = self._regions[owner].name
        if live.dtype != self._dtypes[name] or not can_take(live):
            return False
        strides = live.stride()
        if self._strides.get(owner) != strides:
            self._place(owner, strides, live.element_size())
        return True

    def _place(self, owner: int, strides: tuple[int, ...], itemsize: int) -> None:
        begin, end = np.searchsorted(self._owners, (owner, owner + 1)).tolist()
        for number in range(begin, end):
            piece = self._pieces[number].region
            inside = zip(piece.offset, self._regions[owner].offset, strides, strict=True)
            self._inside[number] = sum((at - base) * step for at, base, step in inside) * itemsize
            self._passes.place(number, strides, list_strides(piece.shape))
        self._strides[owner] = strides

    def _copy(self, number: int, arena: ByteArray, live: torch.Tensor, *, reread: bool) -> int:
        """One piece, by torch."""
        piece, region = self._pieces[number], self._regions[int(self._owners[number])]
        start = int(self._targets[number]) - piece.start_byte
        target = view_piece(piece, self._dtypes[region.name], arena[start:])
        return copy_with_digest(target, live[slices_within(piece.region, region)], piece.region, reread=reread)
