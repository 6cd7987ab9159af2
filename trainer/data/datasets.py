"""The dataset that the configuration names, as batches of its three splits.

The one place that knows the kinds. It may read, tokenize and write a cache, so the first rank of each machine calls
it once before the others do; what it returns is the same on every rank.

    splits = open_splits(cfg, vocab_size=provider.vocab_size, tokenizer_folder=lambda: "path/to/hf")
    splits.train.of_step(consumed_samples=0, data_parallel_rank=0, data_parallel_size=1)
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightcast.trainer.batch_schedule import batch_schedule
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.indexed.samples import open_indexed
from weightcast.trainer.data.mock import MockSamples
from weightcast.trainer.data.packing import check_tokens_fit, load_or_pack
from weightcast.trainer.data.samples import Batches, Samples
from weightcast.trainer.data.sft.splits import open_sft
from weightcast.trainer.data.text import choose_files
from weightcast.trainer.data.text_samples import text_splits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Splits:
    """What is trained on, and what is held out; None where the configuration holds out nothing."""

    train: Batches
    validation: Batches | None
    test: Batches | None


def open_splits(config: ConfigContainer, *, vocab_size: int, tokenizer_folder: Callable[[], str]) -> Splits:
    """The batches. `vocab_size` is the model's; `tokenizer_folder` is asked only where text is tokenized.

    Raises `ConfigError` for data that cannot be read or does not fit the model.
    """

    def held_out_batches(samples: Samples | None) -> Batches | None:
        """Of the whole size, whatever the ramp-up of training: evaluations are to be comparable."""
        if samples is None:
            return None
        return Batches(samples, micro_batch_size=train.micro_batch_size, global_batch_size=train.global_batch_size)

    train = config.train
    training, *held_out = _open_samples(config, vocab_size, tokenizer_folder)
    if config.dataset.split is not None and None in held_out:
        logger.warning("dataset.split=%s: validation or test has no whole sample", config.dataset.split)
    sizes = batch_schedule(config).size_at
    return Splits(
        Batches(training, micro_batch_size=train.micro_batch_size, global_batch_size=sizes),
        *map(held_out_batches, held_out),
    )


def _open_samples(
    config: ConfigContainer, vocab_size: int, tokenizer_folder: Callable[[], str]
) -> tuple[Samples, Samples | None, Samples | None]:
    """Training, validation and test samples."""
    room = vocab_size if config.tokenizer.vocab_size is None else min(vocab_size, config.tokenizer.vocab_size)
    if config.dataset.kind == "mock":
        return _mock_samples(config, room, 0), _mock_samples(config, room, 1), _mock_samples(config, room, 2)
    if config.dataset.kind == "sft":
        return open_sft(config, tokenizer_folder(), cache_folder(config, "sft"), vocab_size=room)
    if config.dataset.kind == "indexed":
        return open_indexed(config, cache_folder(config, "indexed"), vocab_size=room)
    return _text_samples(config, room, tokenizer_folder())


def _mock_samples(config: ConfigContainer, room: int, split: int) -> MockSamples:
    return MockSamples(vocab_size=room, seq_length=config.dataset.seq_length, seed=config.rng.seed, split=split)


def _text_samples(
    config: ConfigContainer, room: int, tokenizer_folder: str
) -> tuple[Samples, Samples | None, Samples | None]:
    stream = load_or_pack(choose_files(config.dataset), tokenizer_folder, cache_folder(config, "tokens"))
    check_tokens_fit(stream.record.max_token_id, room, stream.record.tokenizer)
    return text_splits(stream, seq_length=config.dataset.seq_length, seed=config.rng.seed, split=config.dataset.split)


def cache_folder(config: ConfigContainer, kind: str) -> Path:
    """Where what is made once of the data is kept."""
    return Path(config.dataset.cache_dir) if config.dataset.cache_dir else Path.home() / ".cache/weightcast" / kind
