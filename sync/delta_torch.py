"""The delta codec on a tensor's own device: the same bytes as `delta_codec` writes.

A trainer's GPU finds what changed before anything is copied to the host; an engine's GPU takes the change in place.
Encoding waits for the device (how many changes, how many bytes), so tensors are best encoded many at a time:
`encode_many_on_device` waits twice for all, where it has the kernels of `delta_triton`: on a GPU with Triton, which
torch for CUDA brings. Elsewhere it is torch operations alone.

    delta = encode_on_device(last_published, now)       # None when it would take more than max_bytes
    apply_on_device(delta, weights)
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, SKIP, Delta

# Torch compares and subtracts signed integers on every device; the bits are the same.
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_LIMIT = 1 << 62
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""What was and what is."""
Found: TypeAlias = tuple[Delta, Delta | None]
"""A delta, and the one back."""


def encode_on_device(base: torch.Tensor, new: torch.Tensor, max_bytes: int | None = None) -> Delta | None:
    """The delta from `base` to `new`, flat contiguous tensors of one dtype, length and device; its parts on the host.

    None when it takes more than `max_bytes` (default: no limit).
    """
    (found,) = encode_many_on_device([(base, new)], _NO_LIMIT if max_bytes is None else max_bytes, both=False)
    return None if found is None else found[0]


def encode_many_on_device(pairs: Sequence[Pair], max_bytes: int = _NO_LIMIT, *, both: bool) -> list[Found | None]:
    """The same of many pairs on one device, which is waited for once or twice in all.

    With `both` also the delta from `new` back to `base`, which `delta_codec.reverse_delta` would make of the other.
    """
    for base, new in pairs:
        assert base.dtype == new.dtype and base.shape == new.shape and base.ndim == 1, (base.shape, new.shape)
    if pairs and pairs[0][0].device.type == "cuda" and _has_triton():
        from weightcast.sync.delta_triton import find_deltas

        return find_deltas([(_as_integers(base), _as_integers(new)) for base, new in pairs], max_bytes, both=both)
    return encode_in_torch(pairs, max_bytes, both=both)


def encode_in_torch(pairs: Sequence[Pair], max_bytes: int = _NO_LIMIT, *, both: bool) -> list[Found | None]:
    """What `encode_many_on_device` does without Triton; waits for the device several times a pair."""
    return [_encode_in_torch(base, new, max_bytes, both) for base, new in pairs]


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _encode_in_torch(base: torch.Tensor, new: torch.Tensor, max_bytes: int, both: bool) -> Found | None:
    found = _find(base, new, max_bytes)
    if found is None:
        return None
    gaps, old, changed = found
    delta = _make(gaps, old, changed, len(new))
    if delta.num_bytes > max_bytes:
        return None
    return delta, _make(gaps, changed, old, len(new)) if both else None


def _find(
    base: torch.Tensor, new: torch.Tensor, max_bytes: int
) -> tuple[npt.NDArray[np.uint8], torch.Tensor, torch.Tensor] | None:
    """The gap bytes, on the host, and what lay and lies at the places that they lead to; None beyond `max_bytes`."""
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
