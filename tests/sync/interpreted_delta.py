"""The kernels of `delta_triton` in Triton's interpreter, next to the codec: run by `test_delta_triton`.

    TRITON_INTERPRET=1 python -m tests.sync.interpreted_delta

Prints how many deltas were compared. The interpreter is chosen when Triton is imported, hence the process of its own.
"""

from collections.abc import Sequence

import numpy as np
import torch

from weightcast.sync.delta_codec import find_delta, reverse_delta
from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, ElementArray
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


def compare(states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Both directions, one alone, and limits that are too low: as the codec has it; how many were compared."""
    wanted = [find_delta(_as_elements(old), _as_elements(new), 1 << 40) for old, new in states]
    found = find_deltas(states, 1 << 40, both=True)
    for pair, there, deltas in zip(states, wanted, found, strict=True):
        assert there is not None and deltas is not None and deltas[1] is not None
        assert deltas[0].to_bytes() == there.to_bytes(), "another delta"
        reverse = reverse_delta(there, *(_as_elements(state) for state in pair)) if there.num_changes else there
        assert deltas[1].to_bytes() == reverse.to_bytes(), "another delta back"
        (alone,) = find_deltas([pair], there.num_bytes, both=False)
        assert alone is not None and alone[1] is None and alone[0].to_bytes() == there.to_bytes()
        for limit in (there.num_bytes - 1, HEADER_BYTES - 1):
            assert find_deltas([pair], limit, both=True) == [None], f"{there.num_bytes} bytes passed for {limit}"
    return len(states)


def _as_elements(tensor: torch.Tensor) -> ElementArray:
    return tensor.numpy().view(ELEMENT_TYPES[tensor.element_size()])


def main() -> None:
    """All of the table; and gaps longer than a gap byte."""
    states = [
        make_states(dtype, size, density, seed)
        for dtype in DTYPES
        for seed, size in enumerate(SIZES)
        for density in DENSITIES
    ]
    sparse = torch.zeros(3 * 4096, dtype=torch.int16)
    changed = sparse.clone()
    changed[np.cumsum([0, 254, 255, 256, 257, 510, 511, 5000])] = 1
    print(compare([*states, (sparse, changed)]))


if __name__ == "__main__":
    main()
