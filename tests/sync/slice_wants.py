"""A small model as tensor-parallel workers cut it, what each of them wants, and whether an update has just that."""

from collections.abc import Callable, Sequence

import torch
from tests.sync.parts import bits, random_bits

from weightcast.sync import Region, TensorSpec, Update
from weightcast.sync.digest import region_digest
from weightcast.sync.wanted import WantedRegions, whole

ROWS, COLUMNS, NUM_LAYERS = 64, 96, 3
WantOf = Callable[[Sequence[TensorSpec]], WantedRegions]


def make_layers(seed: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """The model."""
    tensors: dict[str, torch.Tensor] = {"embed": random_bits(torch.bfloat16, (rows, COLUMNS), seed)}
    for layer in range(NUM_LAYERS):
        start = 100 * seed + 10 * layer
        tensors[f"{layer}.up"] = random_bits(torch.bfloat16, (2 * rows, COLUMNS), start + 1)
        tensors[f"{layer}.down"] = random_bits(torch.bfloat16, (rows, 2 * COLUMNS), start + 2)
        tensors[f"{layer}.norm"] = random_bits(torch.float32, (COLUMNS,), start + 3)
    return tensors


def slices_of(rank: int, num_ranks: int) -> WantOf:
    """What one of so many ranks wants: rows of most, columns of `down`, norms whole."""

    def want(specs: Sequence[TensorSpec]) -> WantedRegions:
        wanted = dict(whole(specs))
        for spec in specs:
            if len(spec.shape) == 2:
                dim = 1 if spec.name.endswith("down") else 0
                size = spec.shape[dim] // num_ranks
                shape = tuple(size if d == dim else full for d, full in enumerate(spec.shape))
                offset = tuple(rank * size if d == dim else 0 for d in range(2))
                wanted[spec.name] = (Region(spec.name, offset, shape),)
        return wanted

    return want


def assert_slices(update: Update, wanted: WantedRegions, tensors: dict[str, torch.Tensor]) -> None:
    """The wanted boxes have the tensors' bits, alone and in tensors of full shape."""
    assert update.wanted is not None and update.wanted.regions == wanted
    assert update.stats.kept_bytes == sum(
        box.numel * tensors[name].element_size() for name, boxes in wanted.items() for box in boxes
    )
    seen = []
    for name, tensor in update:
        seen.append(name)
        assert tensor.shape == tensors[name].shape
        for box, part in update.wanted.parts(name):
            assert part.shape == box.shape
            assert torch.equal(bits(part), bits(tensors[name][box.slices])), name
            assert torch.equal(bits(tensor[box.slices]), bits(tensors[name][box.slices])), name
    assert seen == list(tensors)


def digests_of(tensors: dict[str, torch.Tensor], wanted: WantedRegions) -> list[int]:
    """Of each wanted box."""
    return [region_digest(tensors[name][box.slices], box) for name, boxes in wanted.items() for box in boxes]
