"""Text to packed tokens to batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.conftest import write_text

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import DatasetConfig
from weightcast.trainer.data.packing import StreamRecord, TokenStream, load_or_pack
from weightcast.trainer.data.samples import Batches
from weightcast.trainer.data.text import choose_files, stdlib_text_files
from weightcast.trainer.data.text_samples import TextSamples

BOS, EOS = 1, 2


def make_stream(num_tokens: int, starts: list[int]) -> TokenStream:
    record = StreamRecord(1, "", "", BOS, EOS, num_tokens, num_tokens, [])
    return TokenStream(np.arange(num_tokens, dtype=np.int32), np.array(starts, dtype=np.int64), record)


def make_batches(num_tokens: int, *, starts: list[int], seq_length: int = 4, micro: int = 1, total: int = 4) -> Batches:
    stream = make_stream(num_tokens, starts)
    samples = TextSamples(stream, seq_length=seq_length, seed=7)
    return Batches(samples, micro_batch_size=micro, global_batch_size=total)


def test_documents_are_packed_between_bos_and_eos(qwen3: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("w5 w6 w7")
    files[1].write_text("w9")
    stream = load_or_pack(files, str(qwen3), tmp_path / "cache")
    assert stream.tokens.tolist() == [BOS, 5, 6, 7, EOS, BOS, 9, EOS]
    assert stream.document_starts.tolist() == [0, 5]
    assert stream.record.max_token_id == 9
    assert [item["num_tokens"] for item in stream.record.files] == [5, 3]


def test_a_stream_is_made_once_and_again_when_the_text_changes(qwen3: Path, tmp_path: Path) -> None:
    text, cache = write_text(tmp_path / "a.txt", 50, 0), tmp_path / "cache"
    first = load_or_pack([text], str(qwen3), cache)
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    again = load_or_pack([text], str(qwen3), cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == made
    assert np.array_equal(first.tokens, again.tokens)
    write_text(text, 50, 1)
    changed = load_or_pack([text], str(qwen3), cache)
    assert not np.array_equal(first.tokens, changed.tokens)
    assert len([path for path in cache.iterdir() if not path.name.startswith(".")]) == 2
    assert not list(cache.glob(".making-*"))


def test_a_damaged_stream_is_refused(qwen3: Path, tmp_path: Path) -> None:
    text, cache = write_text(tmp_path / "a.txt", 50, 0), tmp_path / "cache"
    load_or_pack([text], str(qwen3), cache)
    (index,) = cache.rglob("index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"num_tokens": 3}))
    with pytest.raises(ConfigError, match="is damaged: remove the folder"):
        load_or_pack([text], str(qwen3), cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n\t", "holds no text"), (b"abc\xff", "not UTF-8 text .byte 3")],
)
def test_text_that_is_none_is_refused(qwen3: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_or_pack([tmp_path / "a.txt"], str(qwen3), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path / "a.txt", 5, 0)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer\.tokenizer_model"):
        load_or_pack([text], str(tmp_path / "model"), tmp_path / "cache")


def test_default_text_is_the_standard_library() -> None:
    files = choose_files(DatasetConfig(max_bytes=200_000))
    assert files == stdlib_text_files(200_000)
    assert all(path.suffix == ".py" for path in files)
    assert 50_000 < sum(path.stat().st_size for path in files) <= 200_000
    with pytest.raises(ConfigError, match=r"dataset\.files"):
        stdlib_text_files(10)


def test_named_files_are_taken_in_order() -> None:
    assert choose_files(DatasetConfig(files=["b", "a"])) == [Path("b"), Path("a")]


def test_labels_are_the_next_tokens_and_document_starts_do_not_count() -> None:
    batches = make_batches(9, starts=[0, 3, 5], total=2)
    by_first = {
        int(batch.tokens[0, 0]): batch
        for batch in batches.of_step(consumed_samples=0, data_parallel_rank=0, data_parallel_size=1)
    }
    assert sorted(by_first) == [0, 4]
    assert by_first[0].tokens.tolist() == [[0, 1, 2, 3]]
    assert by_first[0].labels.tolist() == [[1, 2, 3, 4]]
    assert by_first[0].loss_mask.tolist() == [[1.0, 1.0, 0.0, 1.0]]
    assert by_first[4].loss_mask.tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert by_first[4].position_ids.tolist() == [[0, 1, 2, 3]]


def test_text_shorter_than_a_sample_is_refused() -> None:
    assert make_batches(5, starts=[0]).num_samples == 1
    with pytest.raises(ConfigError, match=r"has 4 tokens, and dataset\.seq_length=4 needs at least 5"):
        make_batches(4, starts=[0])


@settings(deadline=None)  # a busy machine is not a wrong answer
@given(
    ranks=st.integers(1, 4),
    micro=st.integers(1, 3),
    per_rank=st.integers(1, 3),
    num_samples=st.integers(1, 20),
    step=st.integers(0, 5),
)
def test_every_layout_sees_the_same_global_batch(
    ranks: int, micro: int, per_rank: int, num_samples: int, step: int
) -> None:
    total = ranks * micro * per_rank

    def firsts(size: int, micro_size: int) -> list[int]:
        batches = make_batches(4 * num_samples + 1, starts=[0], micro=micro_size, total=total)
        tokens = [
            batch.tokens[:, 0]
            for rank in range(size)
            for batch in batches.of_step(
                consumed_samples=step * total, data_parallel_rank=rank, data_parallel_size=size
            )
        ]
        assert all(len(part) == micro_size for part in tokens)
        return sorted(torch.cat(tokens).tolist())

    assert firsts(ranks, micro) == firsts(1, 1)


def test_an_epoch_takes_every_sample_once_in_an_order_of_its_own() -> None:
    batches = make_batches(4 * 6 + 1, starts=[0], total=6)
    epochs = [
        [
            int(batch.tokens[0, 0]) // 4
            for batch in batches.of_step(consumed_samples=first, data_parallel_rank=0, data_parallel_size=1)
        ]
        for first in (0, 6, 0)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]
    assert epochs[0] == epochs[2]
