"""Samples in the order of training, and the micro-batches made of them.

A dataset is a `Samples`: position `p` (samples consumed since the start of training) alone decides which sample
comes. So a resume needs one number, and every layout of ranks sees the same global batches. Where samples are
finite, `EpochOrder` says which comes at `p`: epoch `p // n`, and there the `p % n`-th of that epoch's permutation.

    batches = Batches(samples, micro_batch_size=1, global_batch_size=8)
    for batch in batches.of_step(consumed_samples=0, data_parallel_rank=0, data_parallel_size=2): ...
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a batch; every array is [seq_length]."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The token after each one."""
    loss_mask: NDArray[np.float32]
    """1 where the label counts."""
    position_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32] | None = None
    """Of a sample that is packed, where each of its sequences starts, and the end."""


class Samples(Protocol):
    """A dataset, in the order of training, over as many epochs as are asked for."""

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch; None where there is no end of new ones."""

    def at(self, position: int) -> Sample:
        """The sample after `position` others; the same one on every rank, whatever was asked for before."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch; every tensor is [micro_batch_size, seq_length]."""

    tokens: torch.Tensor
    """int64 token ids."""
    labels: torch.Tensor
    """int64, the token after each one."""
    loss_mask: torch.Tensor
    """float32, 1 where the label counts."""
    position_ids: torch.Tensor
    """int64, 0 … seq_length - 1; of packed sequences, from 0 in each."""
    cu_seqlens: torch.Tensor | None = None
    """Where sequences that are packed into the one row start, and the end: int32 [sequences + 1]; else None."""
    max_seqlen: int | None = None
    """Tokens of the longest of these."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`. On a GPU it arrives in the order of the work that is queued there."""
        tokens, labels, mask, positions = (
            _move(tensor, device) for tensor in (self.tokens, self.labels, self.loss_mask, self.position_ids)
        )
        boundaries = None if self.cu_seqlens is None else _move(self.cu_seqlens, device)
        return Batch(tokens, labels, mask, positions, boundaries, self.max_seqlen)


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. From pageable memory CUDA would first wait for all that is queued."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Batches:
    """The micro-batches of every step: of `global_batch_size` samples, or as many as it says for a position."""

    def __init__(
        self, samples: Samples, *, micro_batch_size: int, global_batch_size: int | Callable[[int], int]
    ) -> None:
        self.samples = samples
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch; None where there is no end of new ones."""
        return self.samples.num_samples

    def of_step(self, *, consumed_samples: int, data_parallel_rank: int, data_parallel_size: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of the step that starts after `consumed_samples` samples."""
        size, batch = self._micro_batch_size, self._size_at(consumed_samples)
        firsts = range(
            consumed_samples + data_parallel_rank * size,
            consumed_samples + batch,
            size * data_parallel_size,
        )
        return [collate([self.samples.at(first + item) for item in range(size)]) for first in firsts]

    def steps(
        self, num_steps: int, *, data_parallel_rank: int, data_parallel_size: int, consumed_samples: int = 0
    ) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each of `num_steps` steps, as an evaluation goes through them."""
        for _ in range(num_steps):
            yield self.of_step(
                consumed_samples=consumed_samples,
                data_parallel_rank=data_parallel_rank,
                data_parallel_size=data_parallel_size,
            )
            consumed_samples += self._size_at(consumed_samples)

    def _size_at(self, consumed_samples: int) -> int:
        size = self._global_batch_size
        return size if isinstance(size, int) else size(consumed_samples)


class EpochOrder:
    """Which of `num_samples` samples comes at a position: every epoch all of them, in an order of its own."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._epoch_order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))

    def at(self, position: int) -> int:
        """The sample at `position`."""
        epoch, place = divmod(position, self._num_samples)
        if self._epoch_order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._num_samples)
            self._epoch_order = (epoch, order)
        return int(self._epoch_order[1][place])


def collate(rows: list[Sample]) -> Batch:
    """The micro-batch whose rows these are; a packed sample is one alone."""
    tokens, labels, mask, positions = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
        for name in ("tokens", "labels", "loss_mask", "position_ids")
    )
    boundaries = rows[0].cu_seqlens
    if boundaries is None:
        return Batch(tokens, labels, mask, positions)
    assert len(rows) == 1, "a packed sample is a micro-batch of its own; see check_data"
    return Batch(tokens, labels, mask, positions, torch.from_numpy(boundaries), int(np.diff(boundaries).max()))
