"""Fine-tuning rows as samples: one a sequence, or several packed into one.

samples = SftSamples(store, rows, seq_length=2048, seed=1234)         # padded to the length
samples = PackedSftSamples(store, rows, seq_length=2048, seed=1234)   # filled up to it
"""

import numpy as np
from numpy.typing import NDArray

from weightcast.trainer.data.samples import EpochOrder, Sample
from weightcast.trainer.data.sft.packs import first_fit_decreasing
from weightcast.trainer.data.sft.rows import Rows
from weightcast.trainer.data.sft.store import SftStore


class SftSamples:
    """A row a sample, padded at its end. What is padded is seen by nothing before it, and not trained on."""

    def __init__(self, store: SftStore, rows: Rows, *, seq_length: int, seed: int) -> None:
        self.num_samples = len(rows.starts)
        self._store, self._rows, self._seq_length = store, rows, seq_length
        self._order = EpochOrder(self.num_samples, seed)

    def at(self, position: int) -> Sample:
        """The sample at `position` of training."""
        tokens, labels, mask = _pieces(self._store, self._rows, [self._order.at(position)], self._seq_length)
        return Sample(tokens, labels, mask, np.arange(self._seq_length))


class PackedSftSamples:
    """A pack of rows a sample. Each row has positions from 0 and sees itself alone; padding is a last one of these.

    An epoch is all packs, which are the same in every epoch, in an order of its own.
    """

    def __init__(self, store: SftStore, rows: Rows, *, seq_length: int, seed: int) -> None:
        self._store, self._rows, self._seq_length = store, rows, seq_length
        self.packs = first_fit_decreasing(rows.lengths.tolist(), seq_length)
        self.num_samples = len(self.packs)
        self._order = EpochOrder(self.num_samples, seed)

    def at(self, position: int) -> Sample:
        """The sample at `position` of training."""
        pack, length = self.packs[self._order.at(position)], self._seq_length
        tokens, labels, mask = _pieces(self._store, self._rows, pack, length)
        ends = np.cumsum(self._rows.lengths[pack])
        boundaries = np.array([0, *ends, *([length] if ends[-1] < length else [])], dtype=np.int32)
        positions = np.arange(length) - np.repeat(boundaries[:-1], np.diff(boundaries))
        return Sample(tokens, labels, mask, positions, cu_seqlens=boundaries)


def _pieces(
    store: SftStore, rows: Rows, chosen: list[int], seq_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Tokens, labels and loss mask of the rows at `chosen`, end to end and padded to `seq_length`."""
    tokens = np.full(seq_length, store.record.pad_token_id, dtype=np.int64)
    labels = np.full(seq_length, store.record.pad_token_id, dtype=np.int64)
    mask = np.zeros(seq_length, dtype=np.float32)
    at = 0
    for index in chosen:
        start, end = rows.starts[index], rows.ends[index]
        here = slice(at, at + end - start - 1)
        tokens[here] = store.tokens[start : end - 1]
        labels[here] = store.tokens[start + 1 : end]
        mask[here] = store.trained[start + 1 : end]
        at = here.stop
    return tokens, labels, mask
