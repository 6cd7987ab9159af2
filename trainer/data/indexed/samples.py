"""Indexed datasets (`.bin` and `.idx`) as samples, in the order of Megatron's own `GPTDataset`.

Documents are shuffled by the seed, laid end to end, cut into samples and these are shuffled; blends take from their
sources by weight. As in Megatron, the order depends on how many samples the run will take (`train.train_samples`, or
`train.train_iters` and the batch sizes), so a resumed run must keep them. Validation and test are every document of
their share once.

    train, validation, test = open_indexed(cfg, cache_dir, vocab_size=32000)
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)
from weightcast.sync.errors import ConfigError
from weightcast.trainer.batch_schedule import batch_schedule
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.packing import check_tokens_fit
from weightcast.trainer.data.samples import Sample, Samples
from weightcast.trainer.data.split_shares import split_ranges

ALL_TRAINING = "1,0,0"
SURPLUS = 0.005  # Megatron's `mid_level_dataset_surplus`


@dataclass(frozen=True, slots=True)
class Blend:
    """Datasets by their paths without a suffix, and the weight of each; None takes every sample once an epoch."""

    prefixes: list[str]
    weights: list[float] | None


def read_blend(data_path: Sequence[str]) -> Blend:
    """`[prefix, ...]`, or `[weight, prefix, ...]` as Megatron's `--data-path` has it. Raises `ConfigError`."""
    weights, prefixes = list(data_path[0::2]), list(data_path[1::2])
    if not data_path or not _is_number(data_path[0]):
        blend = Blend(list(data_path), None)
    elif len(data_path) % 2 or not all(map(_is_number, weights)) or min(map(float, weights)) <= 0:
        raise ConfigError(f"a blend is weight, path, weight, path, ..., each weight above 0, and not {list(data_path)}")
    else:
        blend = Blend(prefixes, [float(weight) for weight in weights])
    for prefix in blend.prefixes:
        for name in (f"{prefix}.bin", f"{prefix}.idx"):
            if not Path(name).is_file():
                raise ConfigError(f"there is no file {name!r}: name datasets by their paths without .bin and .idx")
    return blend


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def open_indexed(
    config: ConfigContainer, cache_dir: Path, *, vocab_size: int
) -> tuple[Samples, Samples | None, Samples | None]:
    """Training, validation and test samples; None where a split has no share or not one whole sample.

    Raises `ConfigError` for files that cannot be read and too little data to train on.
    """
    from megatron.core.datasets.utils import Split

    given = config.dataset
    num_training = batch_schedule(config).num_samples()
    paths = (given.train_data_path, given.valid_data_path, given.test_data_path)
    opened: list[Samples | None] = []
    for split, own, count in zip(Split, paths, (num_training, None, None), strict=True):
        share = ALL_TRAINING if given.data_path == [] or given.split is None else given.split
        blend = read_blend(own or given.data_path)
        index = split.value if not own else 0
        if not blend.prefixes:
            opened.append(None)
            continue
        dataset = _Blender(config, cache_dir, share, index, split).open(blend, count)
        opened.append(None if dataset is None else IndexedSamples(dataset, blend.prefixes[0], vocab_size))
    if opened[0] is None:
        raise ConfigError(
            f"{given.train_data_path or given.data_path} has not one sample of {given.seq_length} tokens to train on"
        )
    return opened[0], opened[1], opened[2]


class IndexedSamples:
    """Samples of a `GPTDataset` or `BlendedDataset` of Megatron's, over and over."""

    def __init__(self, dataset: Any, name: str, vocab_size: int) -> None:
        self.num_samples = len(dataset)
        self._dataset, self._name, self._vocab_size = dataset, name, vocab_size

    def at(self, position: int) -> Sample:
        """The sample at `position` of training. Raises `ConfigError` for tokens that the model has not."""
        row = self._dataset[position % self.num_samples]
        tokens, labels = row["tokens"].numpy(), row["labels"].numpy()
        check_tokens_fit(int(max(tokens.max(), labels[-1])), self._vocab_size, self._name)
        return Sample(tokens, labels, row["loss_mask"].numpy().astype(np.float32), row["position_ids"].numpy())


@dataclass(frozen=True, slots=True)
class _NoTokenizer:
    """In place of Megatron's tokenizer, which its datasets ask for tokens that we leave to the data."""

    eod: int | None = None
    vocab_size: int | None = None
    unique_identifiers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Blender:
    """One split of datasets, opened by Megatron's classes: not by its builder, which waits for all ranks."""

    config: ConfigContainer
    cache_dir: Path
    share: str
    index: int
    split: Any

    def open(self, blend: Blend, num_samples: int | None) -> Any:
        """The dataset; of several, blended. None where the split has nothing."""
        from megatron.core.datasets.blended_dataset import BlendedDataset

        weights = blend.weights if num_samples is not None else None
        counts: list[int | None] = [num_samples] if len(blend.prefixes) == 1 else [None] * len(blend.prefixes)
        if num_samples is not None and weights is not None:
            counts = [_share_of(num_samples, weight / sum(weights)) for weight in weights]
        opened = [self._dataset(prefix, count) for prefix, count in zip(blend.prefixes, counts, strict=True)]
        if weights is not None and None in opened:
            prefix = blend.prefixes[opened.index(None)]
            raise ConfigError(f"{prefix} has not one sample of {self.config.dataset.seq_length} tokens to train on")
        datasets = [dataset for dataset in opened if dataset is not None]
        if len(datasets) < 2:
            return datasets[0] if datasets else None
        config = copy.copy(datasets[0].config)
        config.path_to_cache = None  # with a cache it asks for a process group; its indices are quick to make
        if weights is not None:
            return BlendedDataset(datasets, weights, num_samples, config)
        sizes = [len(dataset) for dataset in datasets]
        return BlendedDataset(datasets, sizes, None if num_samples is None else min(num_samples, sum(sizes)), config)

    def _dataset(self, prefix: str, num_samples: int | None) -> Any:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        length = self.config.dataset.seq_length
        config = GPTDatasetConfig(
            random_seed=self.config.rng.seed,
            sequence_length=length,
            blend=([prefix], None),
            split=self.share,
            path_to_cache=str(self.cache_dir),
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        low_level = GPTDataset.build_low_level_dataset(prefix, config)
        start, end = split_ranges(self.share, GPTDataset.numel_low_level_dataset(low_level))[self.index]
        documents = np.arange(start, end, dtype=np.int32)
        if int(low_level.sequence_lengths[start:end].sum()) < length + 1:
            return None
        return GPTDataset(low_level, prefix, documents, num_samples, self.split, config)


def _share_of(num_samples: int, weight: float) -> int:
    """Samples that one source is asked for: a few more than its share, as blending rounds."""
    return math.ceil(math.ceil(num_samples * weight) * (1 + SURPLUS))
