"""The three splits of a fine-tuning set: of files, of a library's data set, or shares of the training records.

train, validation, test = open_sft(cfg, "path/to/hf", cache_dir, vocab_size=32000)
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer, DatasetConfig
from weightcast.trainer.data.packing import check_tokens_fit
from weightcast.trainer.data.samples import Samples
from weightcast.trainer.data.sft.rows import Rows, choose_rows
from weightcast.trainer.data.sft.samples import PackedSftSamples, SftSamples
from weightcast.trainer.data.sft.sources import JsonLines, Source, load_library_splits
from weightcast.trainer.data.sft.store import EncoderSettings, SftStore, load_or_encode, read_template

logger = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")


def open_sft(
    config: ConfigContainer, tokenizer_folder: str, cache_dir: Path, *, vocab_size: int
) -> tuple[Samples, Samples | None, Samples | None]:
    """Training, validation and test samples; None where there is nothing. Logs what was cut or left out.

    Raises `ConfigError` for records that cannot be used, with their file and line.
    """
    dataset, seed = config.dataset, config.rng.seed
    settings = EncoderSettings(dataset.prompt_template, read_template(config.tokenizer.chat_template))
    stores: dict[str, SftStore] = {}
    chosen: dict[str, Rows] = {}
    for split, sources in _sources(dataset).items():
        store = stores[split] = load_or_encode(sources, tokenizer_folder, settings, cache_dir)
        if store.record.num_records == 0:
            raise ConfigError(f"{split}: there are no records in {', '.join(str(source) for source in sources)}")
        check_tokens_fit(store.record.max_token_id, vocab_size, tokenizer_folder)
        chosen[split], report = choose_rows(store, seq_length=dataset.seq_length, too_long=dataset.too_long)
        logger.info("%s: %s", split, report)
    for split, rows in _shares(dataset, chosen, seed).items():
        stores[split], chosen[split] = stores["train"], rows

    def samples(split: str) -> Samples:
        kind = PackedSftSamples if dataset.packed_sequence else SftSamples
        return kind(stores[split], chosen[split], seq_length=dataset.seq_length, seed=seed)

    held_out = [samples(split) if split in chosen else None for split in SPLITS[1:]]
    return samples("train"), held_out[0], held_out[1]


def _sources(dataset: DatasetConfig) -> Mapping[str, Sequence[Source]]:
    """What each split is read from; splits that are read from nothing are not there."""
    files = dict(zip(SPLITS, (dataset.files, dataset.validation_files, dataset.test_files), strict=True))
    sources: dict[str, Sequence[Source]] = {
        split: [JsonLines(Path(name)) for name in names] for split, names in files.items() if names
    }
    if dataset.dataset_name is not None:
        for split, source in load_library_splits(dataset.dataset_name, dataset.dataset_subset).items():
            if split in SPLITS and split not in sources and not _share(dataset, split):
                sources[split] = [source]
    if "train" not in sources:
        raise ConfigError(f"dataset.dataset_name={dataset.dataset_name!r} has no split `train`")
    return sources


def _share(dataset: DatasetConfig, split: str) -> float:
    return {"validation": dataset.val_proportion, "test": dataset.test_proportion}.get(split, 0.0)


def _shares(dataset: DatasetConfig, chosen: Mapping[str, Rows], seed: int) -> dict[str, Rows]:
    """The training rows divided by `val_proportion` and `test_proportion`, at random; nothing where both are 0."""
    sizes = {split: _share(dataset, split) for split in SPLITS[1:] if _share(dataset, split)}
    if not sizes:
        return {}
    rows = chosen["train"]
    order = np.random.default_rng(seed).permutation(len(rows.starts))
    divided, at = {}, 0
    for split, share in sizes.items():
        count = round(share * len(order))
        if count == 0:
            raise ConfigError(f"{share} of {len(order)} records is none: raise dataset.*_proportion for {split}")
        divided[split] = rows.take(np.sort(order[at : at + count]))
        at += count
    if at == len(order):
        raise ConfigError(f"the proportions of validation and test take all {len(order)} records: lower them")
    return divided | {"train": rows.take(np.sort(order[at:]))}
