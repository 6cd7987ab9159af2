"""The kernels of `delta_triton` in Triton's interpreter, next to the codec: run by `test_delta_triton`.

    TRITON_INTERPRET=1 python -m tests.sync.interpreted_delta

Prints how many deltas were compared. The interpreter is chosen when Triton is imported, hence the process of its own.
"""

import numpy as np
import torch

from weightcast.sync.delta_codec import find_delta, reverse_delta
from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES
from weightcast.sync.delta_triton import find_deltas

DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
# None, one, a tile and its neighbours, several with a rest.
SIZES = (0, 1, 31, 4095, 4096, 4097, 13_011)
DENSITIES = (0.0, 0.001, 0.05, 1.0)
# Steps on both sides of what a byte holds, in both directions.
STEPS = (-129, -128, -127, -1, 1, 127, 128, 129)


def make_states(dtype: torch.dtype, size: int, density: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bits, and what came of them: small steps, those around a byte's ends, and other bits."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (2 * size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    old, other = raw.view(dtype)[:size], raw.view(dtype)[size:]
    steps = torch.tensor(STEPS)[torch.randint(0, len(STEPS), (size,), generator=generator)].to(dtype)
    is_changed = torch.rand(size, generator=generator) < density
    is_other = torch.rand(size, generator=generator) < 0.1
    return old, torch.where(is_changed, torch.where(is_other, other, old + steps), old)


def compare(old: torch.Tensor, new: torch.Tensor) -> int:
    """Both directions, one alone, and a limit that is a byte too low: as the codec has it; how many were compared."""
    before, after = (tensor.numpy().view(ELEMENT_TYPES[tensor.element_size()]) for tensor in (old, new))
    wanted = find_delta(before, after, 1 << 40)
    found = find_deltas(old, new, 1 << 40, both=True)
    assert wanted is not None and found is not None
    there, back = found
    assert back is not None
    assert there.to_bytes() == wanted.to_bytes(), "another delta"
    reverse = reverse_delta(wanted, before, after) if wanted.num_changes else wanted
    assert back.to_bytes() == reverse.to_bytes(), "another delta back"
    (alone, nothing) = find_deltas(old, new, wanted.num_bytes, both=False) or (None, None)
    assert alone is not None and nothing is None and alone.to_bytes() == wanted.to_bytes()
    for limit in (wanted.num_bytes - 1, HEADER_BYTES - 1):
        assert find_deltas(old, new, limit, both=True) is None, f"{wanted.num_bytes} bytes passed for {limit}"
    return 5


def main() -> None:
    """All of the table; and gaps longer than a gap byte."""
    compared = sum(
        compare(*make_states(dtype, size, density, seed))
        for dtype in DTYPES
        for seed, size in enumerate(SIZES)
        for density in DENSITIES
    )
    sparse = torch.zeros(3 * 4096, dtype=torch.int16)
    changed = sparse.clone()
    changed[np.cumsum([0, 254, 255, 256, 257, 510, 511, 5000])] = 1
    print(compared + compare(sparse, changed))


if __name__ == "__main__":
    main()
