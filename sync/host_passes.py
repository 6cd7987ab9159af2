"""Many pieces copied and digested in host memory by one call, without Python between them: tables made once a layout.

    passes = HostPasses(regions, itemsizes)
    passes.place(number, source_strides, target_strides)       # in elements; of each piece, before it is run
    passes.run(first, last, sources, targets, streams=True)    # addresses of their first elements; digests, in order

As `device_passes`, for the loops in C of `digest_kernel`; where those were not built there is none (`has_passes`). A
model of 300 tensors is some 500 pieces, and to call the loops for each of them takes a third of what they do.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightcast.sync import digest_kernel
from weightcast.sync.digest import MIN_STREAM_BYTES, block_weights
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.regions import Region

BOX_FIELDS = 9
"""Of a box, as the C file has them: bytes of an element, dimensions, where shape, offset and strides (in bytes) of
source and target are, the two addresses, whether to go around the cache."""
_SHAPE, _OFFSET, _SOURCE_STRIDES, _TARGET_STRIDES, _SOURCE, _TARGET, _STREAMS = range(2, 9)


def has_passes() -> bool:
    """Whether the loops were built."""
    return digest_kernel.available_levels()[-1] != digest_kernel.NUMPY


def list_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a tensor of this shape in C order, in elements."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


class HostPasses:
    """See the module. The regions are not empty; one thread at a time may use it."""

    def __init__(self, regions: Sequence[Region], itemsizes: Sequence[int]) -> None:
        assert len(regions) == len(itemsizes) and all(region.numel for region in regions)
        self._itemsizes = list(itemsizes)
        self._dims = [max(1, len(region.shape)) for region in regions]
        self._is_placed = np.zeros(len(regions), np.bool_)
        self._firsts = np.concatenate([[0], np.cumsum(self._dims)]).astype(np.int64) * 4
        self._numbers: Int64Array = np.zeros(int(self._firsts[-1]), np.int64)
        self._boxes: Int64Array = np.zeros((len(regions), BOX_FIELDS), np.int64)
        self._num_bytes = np.array([region.numel for region in regions], np.int64) * np.array(itemsizes, np.int64)
        self._boxes[:, 0] = itemsizes
        self._boxes[:, 1] = self._dims
        step = self._numbers.itemsize
        for place, column in enumerate((_SHAPE, _OFFSET, _SOURCE_STRIDES, _TARGET_STRIDES)):
            inside = self._firsts[:-1] + place * np.array(self._dims, np.int64)
            self._boxes[:, column] = self._numbers.ctypes.data + inside * step
        for number, region in enumerate(regions):
            self._write(number, 0, region.shape or (1,))
            self._write(number, 1, region.offset or (0,))

    def __len__(self) -> int:
        return len(self._itemsizes)

    def place(self, number: int, source_strides: tuple[int, ...], target_strides: tuple[int, ...]) -> None:
        """How a piece lies on both sides, in elements; the last dimension is contiguous (`digest_kernel.can_take`)."""
        itemsize = self._itemsizes[number]
        for place, strides in ((2, source_strides), (3, target_strides)):
            self._write(number, place, tuple(stride * itemsize for stride in strides or (1,)))
        self._is_placed[number] = True

    def run(
        self, first: int, last: int, sources: Int64Array, targets: Int64Array, *, streams: bool
    ) -> npt.NDArray[np.uint64]:
        """Copy the pieces `first` to `last`, which is not among them, from address to address; their digests.

        All addresses are of memory that lives on. With `streams` large pieces go around the cache. A source of 0 leaves
        its piece out, with a digest of 0; the others are placed.
        """
        boxes = self._boxes[first:last]
        boxes[:, _SOURCE], boxes[:, _TARGET] = sources, targets
        boxes[:, _STREAMS] = (self._num_bytes[first:last] >= MIN_STREAM_BYTES) & streams
        is_there = boxes[:, _SOURCE] != 0
        assert self._is_placed[first:last][is_there].all()
        level = digest_kernel.available_levels()[-1]
        if is_there.all():
            return digest_kernel.digest_boxes(block_weights(), boxes, level=level)
        digests: npt.NDArray[np.uint64] = np.zeros(len(boxes), np.uint64)
        digests[is_there] = digest_kernel.digest_boxes(block_weights(), boxes[is_there], level=level)
        return digests

    def _write(self, number: int, place: int, values: tuple[int, ...]) -> None:
        dims = self._dims[number]
        assert len(values) == dims, (values, dims)
        start = int(self._firsts[number]) + place * dims
        self._numbers[start : start + dims] = values
