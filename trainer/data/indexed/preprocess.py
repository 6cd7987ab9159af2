"""JSON lines to an indexed dataset: `<prefix>_<key>_document.bin` and `.idx`, as Megatron's `preprocess_data.py` does.

Each line's text becomes a document of tokens, in the order of the lines, however many workers there are; Megatron's
own `IndexedDatasetBuilder` writes them. Both files appear when they are whole and on the disk; without its `.idx` no
reader takes a `.bin`, so of a dataset that is replaced the `.idx` goes first and comes last.

    preprocess([Path("a.jsonl")], Path("out/a"), "path/to/hf", PreprocessSettings(workers=4))
"""

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from weightcast.bridges.disk import is_refused
from weightcast.bridges.whole_folder import refusal
from weightcast.sync.errors import ConfigError, StorageError
from weightcast.trainer.data.packing import load_tokenizer
from weightcast.trainer.data.sft.sources import JsonLines

LINES_AT_ONCE = 64
SUFFIXES = (".bin", ".idx")  # in this order: a dataset is there when its .idx is


@dataclass(frozen=True, slots=True)
class PreprocessSettings:
    """What is taken of each line, and how."""

    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    """Put the tokenizer's end-of-text token behind each document."""
    workers: int = 1
    """Processes that tokenize."""


@dataclass(frozen=True, slots=True)
class PreprocessReport:
    """What was written."""

    prefixes: list[Path]
    """A dataset for each key, as `dataset.data_path` names it."""
    num_documents: int
    num_tokens: int
    num_empty: int
    """Documents without text; they are kept, without tokens, as Megatron's tool keeps them."""


@dataclass(frozen=True, slots=True)
class _Document:
    """The tokens of one key of one line, and of how many each of its sentences has."""

    tokens: list[int]
    lengths: list[int]


def preprocess(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer_folder: str,
    settings: PreprocessSettings,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> PreprocessReport:
    """Write the dataset; `on_bytes` is told how many bytes of text have been done since it was last called.

    Raises `ConfigError` with file and line for a line that cannot be used, and `StorageError` for a disk that refuses
    a write. Then there is no dataset under these names, or the one that was there before.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    if settings.append_eod and tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {tokenizer_folder} has no end-of-text token: use --no-append-eod")
    prefixes = {key: Path(f"{prefix}_{key}_document") for key in settings.json_keys}
    work = {key: Path(f"{path}.making-{os.getpid()}") for key, path in prefixes.items()}
    with _explained(prefix), _removed_at_the_end(list(work.values())):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        counts = _write(work, inputs, tokenizer_folder, len(tokenizer), settings, on_bytes)
        for path in work.values():
            _sync(path)
        for key, path in prefixes.items():
            _take_name(work[key], path)
    return PreprocessReport(list(prefixes.values()), *counts)


@contextmanager
def _explained(prefix: Path) -> Iterator[None]:
    """Say what the disk or the system refuses as `StorageError`."""
    try:
        yield
    except OSError as error:
        if is_refused(error):
            raise StorageError(refusal(prefix, str(error), "start again")) from error
        raise StorageError(f"{prefix}: {error}: name another place, or mend this one") from error


@contextmanager
def _removed_at_the_end(work: Sequence[Path]) -> Iterator[None]:
    """Leave no file that was begun, whatever happens."""
    try:
        yield
    finally:
        for path in work:
            for suffix in SUFFIXES:
                with suppress(OSError):  # where there is no such folder there is no such file
                    Path(f"{path}{suffix}").unlink(missing_ok=True)


def _sync(prefix: Path) -> None:
    """Wait until both files are on the disk, which network file systems refuse no earlier than here."""
    for suffix in SUFFIXES:
        with open(f"{prefix}{suffix}", "rb+") as file:
            os.fsync(file.fileno())


def _take_name(work: Path, prefix: Path) -> None:
    """Rename both files; a process that dies in between leaves no pair of an old and a new one."""
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for suffix in SUFFIXES:
        os.replace(f"{work}{suffix}", f"{prefix}{suffix}")


def _write(
    work: Mapping[str, Path],
    inputs: Sequence[Path],
    tokenizer_folder: str,
    num_entries: int,
    settings: PreprocessSettings,
    on_bytes: Callable[[int], None],
) -> tuple[int, int, int]:
    """Documents, tokens and empty documents that were written."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)

    dtype = DType.optimal_dtype(num_entries)
    num_documents = num_tokens = num_empty = 0
    with ExitStack() as stack:
        builders = {}
        for key, path in work.items():
            builders[key] = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
            stack.enter_context(closing(builders[key].data_file))
        # Closed, so that its processes end here also when the disk is full.
        for num_bytes, lines in stack.enter_context(closing(_encoded(inputs, tokenizer_folder, settings))):
            for documents in lines:
                for key, document in documents.items():
                    # An array: the builder copies tensors in a way that numpy 2 warns of.
                    builders[key].add_document(np.array(document.tokens, dtype=np.int64), document.lengths)
                    num_documents, num_tokens = num_documents + 1, num_tokens + len(document.tokens)
                    num_empty += not document.tokens
            on_bytes(num_bytes)
        if not num_tokens:
            raise ConfigError(f"no text in {', '.join(map(str, inputs))}")
        for key, builder in builders.items():
            builder.finalize(f"{work[key]}.idx")
    return num_documents, num_tokens, num_empty


def _encoded(
    inputs: Sequence[Path], tokenizer_folder: str, settings: PreprocessSettings
) -> Generator[tuple[int, list[dict[str, _Document]]]]:
    """Bytes of text and documents of some lines at a time, in order."""
    texts = _texts(inputs, settings.json_keys)
    chunks = iter(lambda: list(islice(texts, LINES_AT_ONCE)), [])
    encode = partial(_encode, tokenizer_folder, settings.append_eod)
    with ExitStack() as stack:
        if settings.workers == 1:
            yield from map(encode, chunks)
            return
        # A fork would copy the threads' locks of whatever this process has started.
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(context.Pool(settings.workers, initializer=_be_a_worker))
        yield from pool.imap(encode, chunks)


def _texts(inputs: Iterable[Path], keys: Sequence[str]) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """Bytes and sentences of each line, by key. Raises `ConfigError` for a line without a text under a key."""
    for path in inputs:
        for where, record in JsonLines(path).records():
            found = {}
            for key in keys:
                text = record.get(key)
                sentences = [text] if isinstance(text, str) else text
                if not isinstance(sentences, list) or not all(isinstance(part, str) for part in sentences):
                    have = ", ".join(sorted(record))
                    raise ConfigError(f"{where}: no text under {key!r}; the keys are {have}: name one with --json-keys")
                found[key] = sentences
            yield sum(len(part.encode()) for parts in found.values() for part in parts), found


def _be_a_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Any:
    return load_tokenizer(folder)


def _encode(
    tokenizer_folder: str, append_eod: bool, chunk: Sequence[tuple[int, dict[str, list[str]]]]
) -> tuple[int, list[dict[str, _Document]]]:
    """Tokens of some lines, all tokenized at once."""
    tokenizer = _tokenizer(tokenizer_folder)
    texts = [text for _, keys in chunk for sentences in keys.values() for text in sentences]
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    lines = []
    for _, keys in chunk:
        documents = {}
        for key, sentences in keys.items():
            parts = [part for part in (next(ids) for _ in sentences) if part]
            if parts and append_eod:
                parts[-1] = [*parts[-1], tokenizer.eos_token_id]
            documents[key] = _Document([token for part in parts for token in part], [len(part) for part in parts])
        lines.append(documents)
    return sum(size for size, _ in chunk), lines
