"""A trainer's stand-in for weights: a model's tensors, filled and stepped, and the hash that says whether bits agree.

The hash is of bytes in the order of the tensors and knows nothing of weightcast, so that no case trusts weightcast's
own checksums.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import xxhash

from weightcast.sync import HeldRegion, TensorSpec

Step = Literal["all", "sparse", "flip"]
# Of the elements that an optimizer step changes, nine in ten move by one unit in the last place of bf16.
_STEP_SIZES = np.array([1, -1, 2, -2, 5, 300], np.int16)
_STEP_SHARES = (0.44, 0.44, 0.05, 0.05, 0.018, 0.002)


def allocate(specs: Sequence[TensorSpec], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Zeroed memory for a model, every page of it touched, so that no case pays for a kernel's first visit."""
    tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs}
    for tensor in tensors.values():
        tensor.zero_()
    return tensors


def hash_bits(tensors: Iterable[torch.Tensor]) -> str:
    """xxh3-128 over the tensors' bytes; of those on a GPU, over sums that each bit of them changes (`sum_slabs`)."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        # 16 GB would take half a minute on their way to the host, which a machine that is lent does not have.
        digest.update((sum_slabs(flat) if flat.is_cuda else flat).cpu().numpy().data)
    return digest.hexdigest()


def sum_slabs(flat: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, as eight bytes a slab of 2**24 words: each word times an odd number of its own, modulo 2**64.

    Two tensors that differ in one word differ in its slab's sum, since odd numbers have inverses; those that differ in
    more have equal sums with a chance of 2**-64.
    """
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64)
    odd = torch.arange(min(len(words), 1 << 24), device=flat.device).mul_(-7046029254386353131).bitwise_or_(1)
    sums = [(slab * odd[: len(slab)]).sum() for slab in words.split(1 << 24)]  # type: ignore[no-untyped-call]
    rest = flat[whole:].to(torch.int64)
    return torch.cat([*(one.view(1) for one in sums), rest]).view(torch.uint8)


class ModelState:
    """A model's tensors on one device. As a `WeightSource` it holds every tensor whole, as rank `rank`.

    `step` is what an optimizer step does to the bits: `all` changes every element, `sparse` the share `density`,
    `flip` all signs (two steps lead back). The same `seed` gives the same weights and steps in every process.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        *,
        step: Step = "all",
        density: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.tensors = allocate(specs, device)
        self._specs = list(specs)
        self._step: Step = step
        self._density = density
        self._generator = np.random.default_rng(seed)
        fill_normal(self.tensors, seed)

    def specs(self) -> list[TensorSpec]:
        """The model's tensors."""
        return self._specs

    def held(self) -> list[HeldRegion]:
        """All of them."""
        return [HeldRegion(spec.whole(), partial(torch.Tensor.detach, self.tensors[spec.name])) for spec in self._specs]

    @property
    def num_bytes(self) -> int:
        """Of the whole model."""
        return sum(spec.num_bytes for spec in self._specs)

    def step(self) -> None:
        """One optimizer step."""
        for tensor in self.tensors.values():
            bits = tensor.view(torch.int16).view(-1)
            if self._step == "all":
                bits.add_(1)
            elif self._step == "flip":
                bits.bitwise_xor_(-(2**15))
            else:
                self._step_some(bits)

    def _step_some(self, bits: torch.Tensor) -> None:
        # Gaps between the changes of independent elements are geometric.
        gaps = self._generator.geometric(self._density, int(bits.numel() * self._density * 1.1) + 64)
        positions = np.cumsum(gaps) - 1
        positions = positions[positions < bits.numel()]
        steps = self._generator.choice(_STEP_SIZES, len(positions), p=_STEP_SHARES)
        index = torch.from_numpy(positions).to(bits.device)
        bits[index] += torch.from_numpy(steps).to(bits.device)


def fill_normal(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Weights as a model begins with them: normal with a deviation of 0.02, norms one. From one block, shifted."""
    generator = np.random.default_rng(seed)
    block = torch.from_numpy(generator.normal(0, 0.02, (1 << 22) + 12_289).astype(np.float32)).to(torch.bfloat16)
    block = block.to(next((tensor.device for tensor in tensors.values()), block.device))
    for number, tensor in enumerate(tensors.values()):
        if tensor.ndim == 1:
            tensor.fill_(1.0)
            continue
        flat, shifted = tensor.view(-1), block.roll(number * 7919)
        for start in range(0, flat.numel(), len(shifted)):
            part = flat[start : start + len(shifted)]
            part.copy_(shifted[: len(part)])
