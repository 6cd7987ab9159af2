"""Tokenized fine-tuning records, made once and kept.

A store is a folder: `tokens.bin` (int32, record after record), `trained.bin` (uint8, 1 where a token is trained on),
`starts.bin` (int64, where each record starts, and the end) and `index.json`. Nothing is cut here, so one store serves
every `dataset.seq_length`.

    store = load_or_encode([JsonLines(path)], "path/to/hf", EncoderSettings(), cache_dir)
    store.tokens[store.starts[0] : store.starts[1]]
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.cache import key_of, make_once, tokenizer_sha256
from weightcast.trainer.data.packing import load_tokenizer
from weightcast.trainer.data.sft.encode import Encoder
from weightcast.trainer.data.sft.records import RecordError
from weightcast.trainer.data.sft.sources import Source

FORMAT = 1


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What else decides how records become tokens."""

    prompt_template: str = "{input} {output}"
    chat_template: str | None = None
    """The Jinja template itself; None for the tokenizer's own."""


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """What a store was made from, as `index.json` keeps it."""

    format: int
    tokenizer: str
    pad_token_id: int
    max_token_id: int
    num_records: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SftStore:
    """Tokenized records, mapped from disk."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    starts: NDArray[np.int64]
    """Where each record starts, and the end: one more than there are records."""
    record: StoreRecord


def load_or_encode(
    sources: Sequence[Source], tokenizer_folder: str, settings: EncoderSettings, cache_dir: Path
) -> SftStore:
    """The store of `sources`; tokenizes them when it is not in `cache_dir` yet. Any number of processes may call it.

    Raises `ConfigError` with the file and the line for a record that cannot be used.
    """
    what = json.dumps(asdict(settings), sort_keys=True)
    digests = [source.digest() for source in sources]
    key = key_of("sft", str(FORMAT), what, tokenizer_sha256(tokenizer_folder), *digests)
    return _open(make_once(cache_dir / key, lambda folder: _write(folder, sources, tokenizer_folder, settings)))


def _write(folder: Path, sources: Sequence[Source], tokenizer_folder: str, settings: EncoderSettings) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder = Encoder(tokenizer, prompt_template=settings.prompt_template, chat_template=settings.chat_template)
    starts, highest = [0], 0
    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "trained.bin").open("wb") as trained_file:
        for source in sources:
            for where, record in source.records():
                try:
                    encoded = encoder.encode(record)
                except RecordError as error:
                    raise ConfigError(f"{where}: {error}") from error
                encoded.tokens.tofile(tokens_file)
                encoded.trained.astype(np.uint8).tofile(trained_file)
                starts.append(starts[-1] + len(encoded.tokens))
                highest = max(highest, int(encoded.tokens.max()))
    np.array(starts, dtype=np.int64).tofile(folder / "starts.bin")
    record_of_it = StoreRecord(FORMAT, tokenizer_folder, _padding(tokenizer), highest, len(starts) - 1, starts[-1])
    (folder / "index.json").write_text(json.dumps(asdict(record_of_it), indent=1), encoding="utf-8")


def read_template(given: str | None) -> str | None:
    """A chat template: what the setting says, or what stands in the file that it names."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"tokenizer.chat_template={given!r} is neither a Jinja template nor a file with one: {error}"
        ) from error


def _padding(tokenizer: Any) -> int:
    """A token to fill rows with; which one makes no difference, as none is looked at or trained on."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _open(folder: Path) -> SftStore:
    record = StoreRecord(**json.loads((folder / "index.json").read_text(encoding="utf-8")))
    starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
    if record.num_tokens == 0:
        return SftStore(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8), starts, record)
    tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
    trained = np.memmap(folder / "trained.bin", dtype=np.uint8, mode="r")
    if len({len(tokens), len(trained), record.num_tokens}) != 1 or len(starts) != record.num_records + 1:
        raise ConfigError(f"the tokens in {folder} are damaged: remove the folder, and they are made again")
    return SftStore(tokens, trained, starts, record)
