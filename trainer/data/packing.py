"""One packed stream of tokens from text files, made once and kept.

A stream is a folder: `tokens.bin` (int32, document after document), `starts.bin` (int64, where each document
starts) and `index.json` (the files, their sums, the tokenizer). Its name is a hash of what went in, so text or a
tokenizer that changed gives another folder; it is written beside its place and renamed, so it is whole or absent.

    stream = load_or_pack(files, "path/to/hf", cache_dir)
    stream.tokens[:8]
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.cache import file_sha256, key_of, make_once, tokenizer_sha256
from weightcast.trainer.data.text import read_document

FORMAT = 1


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """What a stream was made from, as `index.json` keeps it."""

    format: int
    tokenizer: str
    tokenizer_sha256: str
    bos_token_id: int | None
    eos_token_id: int | None
    max_token_id: int
    num_tokens: int
    files: list[dict[str, str | int]]
    """`path`, `sha256` and `num_tokens` of each document, in order."""


@dataclass(frozen=True, slots=True)
class TokenStream:
    """A packed stream, mapped from disk."""

    tokens: NDArray[np.int32]
    document_starts: NDArray[np.int64]
    record: StreamRecord


def load_or_pack(files: Sequence[Path], tokenizer_folder: str, cache_dir: Path) -> TokenStream:
    """The stream of `files`; tokenizes them when it is not in `cache_dir` yet. Any number of processes may call it.

    Raises `ConfigError` for text that is empty or unreadable, and for a folder without a tokenizer.
    """
    if not files:
        raise ConfigError("no text: dataset.files is empty; name at least one file")
    shas = [file_sha256(path) for path in files]
    tokenizer_sha = tokenizer_sha256(tokenizer_folder)

    def write(folder: Path) -> None:
        record = _write_stream(folder, files, shas, tokenizer_folder, tokenizer_sha)
        (folder / "index.json").write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")

    return _open(make_once(cache_dir / key_of(str(FORMAT), tokenizer_sha, *shas), write))


def _open(folder: Path) -> TokenStream:
    record = StreamRecord(**json.loads((folder / "index.json").read_text(encoding="utf-8")))
    tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
    starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
    if len(tokens) != record.num_tokens or len(starts) != len(record.files):
        raise ConfigError(f"the token stream in {folder} is damaged: remove the folder, and it is made again")
    return TokenStream(tokens, starts, record)


def _write_stream(
    work: Path, files: Sequence[Path], shas: Sequence[str], tokenizer_folder: str, tokenizer_sha: str
) -> StreamRecord:
    tokenizer = load_tokenizer(tokenizer_folder)
    starts: list[int] = []
    documents: list[dict[str, str | int]] = []
    total = highest = 0
    with (work / "tokens.bin").open("wb") as out:
        for path, sha, tokens in zip(files, shas, _documents(files, tokenizer), strict=True):
            starts.append(total)
            total += len(tokens)
            highest = max(highest, int(tokens.max()))
            documents.append({"path": str(path), "sha256": sha, "num_tokens": len(tokens)})
            tokens.tofile(out)
    np.array(starts, dtype=np.int64).tofile(work / "starts.bin")
    return StreamRecord(
        format=FORMAT,
        tokenizer=tokenizer_folder,
        tokenizer_sha256=tokenizer_sha,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_token_id=highest,
        num_tokens=total,
        files=documents,
    )


def _documents(files: Sequence[Path], tokenizer: Any) -> Iterator[NDArray[np.int32]]:
    """Token ids of each file: `[bos] text [eos]`, as far as the tokenizer has them.

    They are put there by hand because tokenizers differ in what they add: Gemma's adds no `<bos>`, Qwen has none.
    """
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for path in files:
        ids = tokenizer(read_document(path), add_special_tokens=False, verbose=False)["input_ids"]
        yield np.array([*before, *ids, *after], dtype=np.int32)


def load_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer in `folder`. Raises `ConfigError` when there is none."""
    from transformers import AutoTokenizer  # slow to import, and needed only where a stream is made

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer in {folder!r}: {str(error).splitlines()[0]}; put the model's tokenizer files there, or "
            f"name another folder with tokenizer.tokenizer_model"
        ) from error


def check_tokens_fit(max_token_id: int, room: int, source: str) -> None:
    """Raise `ConfigError` when the model has no embedding for a token."""
    if max_token_id >= room:
        raise ConfigError(
            f"the tokenizer of {source} gives token {max_token_id}, and the model has "
            f"{room}: name the model's own tokenizer with tokenizer.tokenizer_model"
        )
