"""Samples cut from a packed stream of text: windows of `seq_length` tokens, end to end.

samples = TextSamples(stream, seq_length=128, seed=1234)
samples.at(0).tokens
"""

import numpy as np
from numpy.typing import NDArray

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.packing import TokenStream
from weightcast.trainer.data.samples import EpochOrder, Sample


class TextSamples:
    """The windows of `stream`, shuffled. Raises `ConfigError` when it has not one whole window."""

    def __init__(self, stream: TokenStream, *, seq_length: int, seed: int) -> None:
        # One token more than the samples cover, because the last token of a sample needs a label.
        self.num_samples = (len(stream.tokens) - 1) // seq_length
        if self.num_samples < 1:
            raise ConfigError(
                f"the text has {len(stream.tokens)} tokens, and dataset.seq_length={seq_length} needs at least "
                f"{seq_length + 1}: give more text (dataset.files) or a shorter dataset.seq_length"
            )
        self._stream = stream
        self._seq_length = seq_length
        self._order = EpochOrder(self.num_samples, seed)

    def at(self, position: int) -> Sample:
        """The sample at `position` of training."""
        index, length = self._order.at(position), self._seq_length
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
