"""The delta codec on a tensor's own device: the same bytes as `delta_codec` writes.

A trainer's GPU finds what changed before anything is copied to the host; an engine's GPU takes the change in place.
Encoding waits for the device (how many changes, how many gap bytes), so many tensors of one dtype are best encoded as
one flat bucket. On a GPU the kernels of `delta_triton` do it where there is Triton, which torch for CUDA brings;
otherwise in torch operations alone.

    delta = encode_on_device(last_published, now)       # None when it would take more than max_bytes
    apply_on_device(delta, weights)
"""

from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, SKIP, Delta

# Torch compares and subtracts signed integers on every device; the bits are the same.
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_LIMIT = 1 << 62


def encode_on_device(base: torch.Tensor, new: torch.Tensor, max_bytes: int | None = None) -> Delta | None:
    """The delta from `base` to `new`, flat contiguous tensors of one dtype, length and device; its parts on the host.

    None when it takes more than `max_bytes` (default: no limit).
    """
    limit = max_bytes if max_bytes is not None else _NO_LIMIT
    found = _find_deltas(base, new, limit, both=False)
    return None if found is None else found[0]


def encode_both_on_device(base: torch.Tensor, new: torch.Tensor, max_bytes: int) -> tuple[Delta, Delta] | None:
    """The same, and the delta from `new` back to `base`, which `delta_codec.reverse_delta` would make of it."""
    found = _find_deltas(base, new, max_bytes, both=True)
    if found is None:
        return None
    there, back = found
    assert back is not None
    return there, back


def _find_deltas(
    base: torch.Tensor, new: torch.Tensor, max_bytes: int, *, both: bool
) -> tuple[Delta, Delta | None] | None:
    if base.device.type == "cuda" and _has_triton():
        from weightcast.sync.delta_triton import find_deltas

        assert base.dtype == new.dtype and base.shape == new.shape and base.ndim == 1, (base.shape, new.shape)
        return find_deltas(_as_integers(base), _as_integers(new), max_bytes, both=both)
    return encode_in_torch(base, new, max_bytes, both=both)


def encode_in_torch(
    base: torch.Tensor, new: torch.Tensor, max_bytes: int = _NO_LIMIT, *, both: bool = False
) -> tuple[Delta, Delta | None] | None:
    """What `encode_on_device` and `encode_both_on_device` do without Triton."""
    found = _find(base, new, max_bytes)
    if found is None:
        return None
    gaps, old, changed = found
    delta = _make(gaps, old, changed, len(new))
    if delta.num_bytes > max_bytes:
        return None
    return delta, _make(gaps, changed, old, len(new)) if both else None


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _find(
    base: torch.Tensor, new: torch.Tensor, max_bytes: int
) -> tuple[npt.NDArray[np.uint8], torch.Tensor, torch.Tensor] | None:
    """The gap bytes, on the host, and what lay and lies at the places that they lead to; None beyond `max_bytes`."""
    assert base.dtype == new.dtype and base.shape == new.shape and base.ndim == 1, (base.shape, new.shape)
    before, after = _as_integers(base), _as_integers(new)
    positions = torch.nonzero(before != after).squeeze(1)
    if HEADER_BYTES + 2 * len(positions) > max_bytes:
        return None
    return _gaps_between(positions).cpu().numpy(), before[positions], after[positions]


def _make(gaps: npt.NDArray[np.uint8], old: torch.Tensor, changed: torch.Tensor, num_elements: int) -> Delta:
    """The delta that turns the elements `old`, at the places of `gaps`, into `changed`."""
    itemsize, step = changed.element_size(), changed - old
    # No step of a one-byte element is beyond a byte.
    is_exception = (step < -128) | (step > 127) if itemsize > 1 else torch.zeros_like(step, dtype=torch.bool)
    ordinals = torch.nonzero(is_exception).squeeze(1)
    return Delta(
        itemsize,
        num_elements,
        changed[ordinals].cpu().numpy().view(ELEMENT_TYPES[itemsize]),
        ordinals.to(torch.int32).cpu().numpy().view(np.uint32),
        gaps,
        changed.view(torch.uint8).view(-1, itemsize)[:, 0].contiguous().cpu().numpy(),
    )


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
    return tensor.detach().view(SIGNED[tensor.element_size()])


def _gaps_between(positions: torch.Tensor) -> torch.Tensor:
    """The gap bytes that lead to `positions`, rising: uint8, on their device."""
    skipped = torch.diff(positions, prepend=positions.new_full((1,), -1)) - 1
    ends = torch.cumsum(skipped // SKIP + 1, 0)
    gaps = torch.full((int(ends[-1]) if len(ends) else 0,), SKIP, dtype=torch.uint8, device=positions.device)
    gaps[ends - 1] = (skipped % SKIP).to(torch.uint8)
    return gaps
