"""Samples cut from a packed stream of text: windows of `seq_length` tokens, end to end.

samples = TextSamples(stream, seq_length=128, seed=1234)
samples.at(0).tokens
"""

import numpy as np
from numpy.typing import NDArray

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.packing import TokenStream
from weightcast.trainer.data.samples import EpochOrder, Sample
from weightcast.trainer.data.split_shares import split_ranges


class TextSamples:
    """The windows of `stream`, shuffled."""

    def __init__(
        self, stream: TokenStream, *, seq_length: int, seed: int, windows: tuple[int, int] | None = None
    ) -> None:
        """`windows` are from where to where they are taken; None takes all."""
        self._first, end = windows if windows is not None else (0, num_windows(stream, seq_length))
        self.num_samples = end - self._first
        self._stream = stream
        self._seq_length = seq_length
        self._order = EpochOrder(self.num_samples, seed)

    def at(self, position: int) -> Sample:
        """The sample at `position` of training."""
        index, length = self._first + self._order.at(position), self._seq_length
        window = self._stream.tokens[index * length : (index + 1) * length + 1].astype(np.int64)
        return Sample(window[:-1], window[1:], self._loss_mask(index), np.arange(length))

    def _loss_mask(self, index: int) -> NDArray[np.float32]:
        """0 where the label is a document's first token: nothing before it tells what the next document is."""
        first_label = index * self._seq_length + 1
        starts = self._stream.document_starts
        inside = starts[np.searchsorted(starts, first_label) : np.searchsorted(starts, first_label + self._seq_length)]
        mask = np.ones(self._seq_length, dtype=np.float32)
        mask[inside - first_label] = 0.0
        return mask


def num_windows(stream: TokenStream, seq_length: int) -> int:
    """Whole windows of `stream`. Raises `ConfigError` when there is none."""
    # One token more than the samples cover, because the last token of a sample needs a label.
    count = (len(stream.tokens) - 1) // seq_length
    if count < 1:
        raise ConfigError(
            f"the text has {len(stream.tokens)} tokens, and dataset.seq_length={seq_length} needs at least "
            f"{seq_length + 1}: give more text (dataset.files) or a shorter dataset.seq_length"
        )
    return count


def text_splits(
    stream: TokenStream, *, seq_length: int, seed: int, split: str | None
) -> tuple[TextSamples, TextSamples | None, TextSamples | None]:
    """Training, validation and test samples; None where a split has no window. Raises `ConfigError`."""
    count = num_windows(stream, seq_length)
    ranges = split_ranges(split if split is not None else "1", count)
    if ranges[0][0] == ranges[0][1]:
        raise ConfigError(f"dataset.split={split} leaves none of {count} samples to train on: give more text")
    opened = [
        TextSamples(stream, seq_length=seq_length, seed=seed, windows=place) if place[0] < place[1] else None
        for place in ranges
    ]
    assert opened[0] is not None
    return opened[0], opened[1], opened[2]
