"""How a stored piece gets into a tensor: dense bytes straight to their place, deltas on what is there."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from weightcast.sync.delta_codec import apply_delta, as_elements
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.delta_wire import unpack_delta
from weightcast.sync.disk.records import StoredPiece
from weightcast.sync.regions import Region

ReadPiece: TypeAlias = Callable[[StoredPiece, memoryview], None]


def place_piece(piece: StoredPiece, region: Region, tensor: torch.Tensor, read: ReadPiece) -> None:
    """Bring the box `region` of `tensor` (contiguous, on the CPU) to the state that `piece` has.

    For a delta the box must hold the state that it was made against. Raises `WireError` before the first write when a
    delta is malformed, and what `read` raises.
    """
    if not region.numel:
        return
    box = tensor[region.slices]
    # A box that does not lie in one run (a cut along a later dimension) is worked on in a copy.
    flat = box if box.is_contiguous() else box.contiguous() if piece.encoding != "dense" else torch.empty_like(box)
    flat = flat if flat.is_contiguous() else flat.contiguous()
    raw: ByteArray = flat.reshape(-1).view(torch.uint8).numpy()
    if piece.encoding == "dense":
        read(piece, raw.data)
    else:
        payload = np.empty(piece.num_bytes, np.uint8)
        read(piece, payload.data)
        elements = as_elements(raw, tensor.element_size())
        apply_delta(unpack_delta(payload, elements) if piece.encoding == "zdelta" else payload, elements)
    if flat is not box:
        box.copy_(flat)
