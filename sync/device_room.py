"""Whether a GPU has room for the last bits of the weights that it holds, and that room."""

import logging
from collections.abc import Mapping, Sequence

import torch

from weightcast.sync.regions import HeldRegion, Region

logger = logging.getLogger(__name__)

# Of a device's memory, what is left to the trainer when the last bits are kept there.
RESERVE_SHARE = 0.1


def has_room(free_bytes: int, total_bytes: int, num_bytes: int) -> bool:
    """Whether a device may keep `num_bytes` more and leave the trainer its reserve. Pure."""
    return num_bytes + RESERVE_SHARE * total_bytes <= free_bytes


def find_room(regions: Sequence[Region], held: Mapping[Region, HeldRegion], num_bytes: int) -> torch.Tensor | None:
    """Memory for the last bits on the GPU that holds these weights; None on a CPU, and where it has too little."""
    first = next((region for region in regions if region.numel), None)
    if first is None:
        return None
    device = held[first].live().device
    if device.type != "cuda":
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    if not has_room(free_bytes, total_bytes, num_bytes):
        logger.info(
            "what changed is found on the host: %s has %d bytes free, and %d are needed besides a reserve of %d",
            *(device, free_bytes, num_bytes, int(RESERVE_SHARE * total_bytes)),
        )
        return None
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
