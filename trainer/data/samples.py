"""Samples of a packed stream, in an order that depends on the seed and the position alone.

Position `p` (samples consumed since the start of training) decides which sample comes: epoch `p // n`, and there
the `p % n`-th of that epoch's permutation. So a resume needs one number, and every layout of ranks sees the same
global batches.

    batches = Batches(stream, seq_length=128, micro_batch_size=1, global_batch_size=8, seed=1234)
    for batch in batches.of_step(consumed_samples=0, data_parallel_rank=0, data_parallel_size=2): ...
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.packing import TokenStream


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
    """int64, 0 … seq_length - 1."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            self.tokens.to(device), self.labels.to(device), self.loss_mask.to(device), self.position_ids.to(device)
        )


class Batches:
    """The micro-batches of every step. Raises `ConfigError` when the stream has not one whole sample."""

    def __init__(
        self, stream: TokenStream, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int
    ) -> None:
        # One token more than the samples cover, because the last token of a sample needs a label.
        self.num_samples = (len(stream.tokens) - 1) // seq_length
        if self.num_samples < 1:
            raise ConfigError(
                f"the text has {len(stream.tokens)} tokens, and dataset.seq_length={seq_length} needs at least "
                f"{seq_length + 1}: give more text (dataset.files) or a shorter dataset.seq_length"
            )
        self._stream = stream
        self._seq_length = seq_length
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._epoch_order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))

    def of_step(self, *, consumed_samples: int, data_parallel_rank: int, data_parallel_size: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of the step that starts after `consumed_samples` samples."""
        size = self._micro_batch_size
        firsts = range(
            consumed_samples + data_parallel_rank * size,
            consumed_samples + self._global_batch_size,
            size * data_parallel_size,
        )
        return [self._batch([self._sample_at(first + item) for item in range(size)]) for first in firsts]

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        if self._epoch_order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self.num_samples)
            self._epoch_order = (epoch, order)
        return int(self._epoch_order[1][place])

    def _batch(self, samples: list[int]) -> Batch:
        length = self._seq_length
        windows = np.stack([self._stream.tokens[s * length : (s + 1) * length + 1] for s in samples])
        ids = torch.from_numpy(windows.astype(np.int64))
        masks = torch.from_numpy(np.stack([self._loss_mask(s) for s in samples]))
        positions = torch.arange(length).expand(len(samples), length).contiguous()
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), masks, positions)

    def _loss_mask(self, sample: int) -> NDArray[np.float32]:
        """0 where the label is a document's first token: nothing before it tells what the next document is."""
        first_label = sample * self._seq_length + 1
        starts = self._stream.document_starts
        inside = starts[np.searchsorted(starts, first_label) : np.searchsorted(starts, first_label + self._seq_length)]
        mask = np.ones(self._seq_length, dtype=np.float32)
        mask[inside - first_label] = 0.0
        return mask
