"""The delta codec on a tensor's own device, in torch operations alone: the same bytes as `delta_codec` writes.

A trainer's GPU finds what changed before anything is copied to the host; an engine's GPU takes the change in place.
Encoding waits for the device twice (how many changes, how many gap bytes), so many tensors of one dtype are best
encoded as one flat bucket.

    delta = encode_on_device(last_published, now)       # None when it would take more than max_bytes
    apply_on_device(delta, weights)
"""

import numpy as np
import torch

from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, SKIP, Delta

# Torch compares and subtracts signed integers on every device; the bits are the same.
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode_on_device(base: torch.Tensor, new: torch.Tensor, max_bytes: int | None = None) -> Delta | None:
    """The delta from `base` to `new`, flat contiguous tensors of one dtype, length and device; its parts on the host.

    None when it takes more than `max_bytes` (default: no limit).
    """
    assert base.dtype == new.dtype and base.shape == new.shape and base.ndim == 1, (base.shape, new.shape)
    before, after = _as_integers(base), _as_integers(new)
    positions = torch.nonzero(before != after).squeeze(1)
    if max_bytes is not None and HEADER_BYTES + 2 * len(positions) > max_bytes:
        return None
    changed = after[positions]
    step = changed - before[positions]
    # No step of a one-byte element is beyond a byte.
    is_exception = (step < -128) | (step > 127) if new.element_size() > 1 else torch.zeros_like(step, dtype=torch.bool)
    ordinals = torch.nonzero(is_exception).squeeze(1)
    delta = Delta(
        new.element_size(),
        len(new),
        changed[ordinals].cpu().numpy().view(ELEMENT_TYPES[new.element_size()]),
        ordinals.to(torch.int32).cpu().numpy().view(np.uint32),
        _gaps_between(positions).cpu().numpy(),
        changed.view(torch.uint8).view(-1, new.element_size())[:, 0].contiguous().cpu().numpy(),
    )
    return delta if max_bytes is None or delta.num_bytes <= max_bytes else None


def apply_on_device(delta: Delta, current: torch.Tensor) -> None:
    """Bring `current`, flat and contiguous, to its new state; `delta` has passed `parse_delta` for its size."""
    assert (current.element_size(), current.numel(), current.ndim) == (delta.itemsize, delta.num_elements, 1)
    integers = _as_integers(current)
    gaps, low, values, ordinals = (
        torch.from_numpy(part).to(current.device)
        for part in (
            delta.gaps.astype(np.int64),
            delta.low.copy(),
            delta.values.astype(f"<i{delta.itemsize}"),
            delta.ordinals.astype(np.int64),
        )
    )
    is_change = gaps != SKIP
    positions = torch.cumsum(gaps + is_change, 0)[is_change] - 1
    changed = integers[positions]
    present_low = changed.view(torch.uint8).view(-1, delta.itemsize)[:, 0]
    changed += (low - present_low).view(torch.int8).to(changed.dtype)
    changed[ordinals] = values
    integers[positions] = changed


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous(), "a delta is of contiguous memory"
    return tensor.detach().view(_SIGNED[tensor.element_size()])


def _gaps_between(positions: torch.Tensor) -> torch.Tensor:
    """The gap bytes that lead to `positions`, rising: uint8, on their device."""
    skipped = torch.diff(positions, prepend=positions.new_full((1,), -1)) - 1
    ends = torch.cumsum(skipped // SKIP + 1, 0)
    gaps = torch.full((int(ends[-1]) if len(ends) else 0,), SKIP, dtype=torch.uint8, device=positions.device)
    gaps[ends - 1] = (skipped % SKIP).to(torch.uint8)
    return gaps
