"""Mock data: no files, no tokenizer, no end, and something to learn.

A sample is a walk over a few hundred token ids: after each comes its successor, the same one in all samples, or, once
in `RESTART_EVERY` tokens on average, a token drawn anew, low ids more often. So the loss falls from ln(vocabulary)
within a few steps (which ids occur) and goes on to about 1 (what follows what); noise would leave it where it is.
The seed, the split and the position decide each sample, with nothing kept in between.

    samples = MockSamples(vocab_size=32000, seq_length=128, seed=1234)
    samples.at(10**9).tokens
"""

import numpy as np
from numpy.typing import NDArray

from weightcast.trainer.data.samples import Sample

MAX_IDS = 512
RESTART_EVERY = 8


class MockSamples:
    """Samples of made-up tokens, all below `vocab_size`. `split` numbers streams that have no sample in common."""

    num_samples: int | None = None

    def __init__(self, *, vocab_size: int, seq_length: int, seed: int, split: int = 0) -> None:
        self._seq_length = seq_length
        self._seed = seed
        self._split = split
        num_ids = min(vocab_size, MAX_IDS)
        self._cycle = np.random.default_rng(seed).permutation(num_ids)
        """Each id's successor is the next one here."""
        self._place = np.argsort(self._cycle)
        self._cumulated = np.cumsum(1.0 / np.arange(1, num_ids + 1))

    def at(self, position: int) -> Sample:
        """The sample at `position` of training."""
        walk = self._walk(np.random.default_rng([self._seed, self._split, position]))
        length = self._seq_length
        return Sample(walk[:-1], walk[1:], np.ones(length, dtype=np.float32), np.arange(length))

    def _walk(self, draw: np.random.Generator) -> NDArray[np.int64]:
        """`seq_length` + 1 ids."""
        size = self._seq_length + 1
        drawn = np.searchsorted(self._cumulated, draw.random(size) * self._cumulated[-1])
        restarts = draw.random(size) * RESTART_EVERY < 1
        restarts[0] = True
        at = np.arange(size)
        started = np.maximum.accumulate(np.where(restarts, at, 0))
        walk: NDArray[np.int64] = self._cycle[(self._place[drawn[started]] + at - started) % len(self._cycle)]
        return walk
