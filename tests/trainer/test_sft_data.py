"""Fine-tuning sets from files and from the `datasets` library: splits, lengths, batches, and what is refused."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.sft_files import character_tokenizer, template, write_lines

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.data import check_samples_fill_a_batch
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.datasets import Splits, open_splits
from weightcast.trainer.data.samples import Batches
from weightcast.trainer.data.sft.rows import Rows
from weightcast.trainer.data.sft.samples import PackedSftSamples, SftSamples
from weightcast.trainer.data.sft.store import SftStore, StoreRecord

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer(template("chatml", marked=False)).save_pretrained(folder)
    return folder


def pairs(*lengths: int) -> list[dict[str, str]]:
    """Records whose prompt is one letter of their own, and whose completion has this length."""
    return [{"prompt": chr(ord("a") + number), "completion": "z" * size} for number, size in enumerate(lengths)]


def open_sft(tmp_path: Path, tokenizer: Path, **settings: Any) -> Splits:
    config = ConfigContainer()
    config.dataset.kind, config.dataset.cache_dir = "sft", str(tmp_path / "cache")
    config.train.global_batch_size = 4
    for name, value in settings.items():
        setattr(config.dataset, name, value)
    return open_splits(config, vocab_size=VOCAB_SIZE, tokenizer_folder=lambda: str(tokenizer))


def epoch_of(batches: Batches | None) -> list[str]:
    """The first character after `<s>` of each sample of an epoch, sorted."""
    assert batches is not None and batches.num_samples is not None
    decode = character_tokenizer().decode
    return sorted(decode(batches.samples.at(position).tokens)[3] for position in range(batches.num_samples))


def test_samples_are_padded_and_train_on_the_completion(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(2))
    sample = open_sft(tmp_path, tokenizer, files=[str(file)], seq_length=7).train.samples.at(0)
    decode = character_tokenizer().decode
    assert decode(sample.tokens) == "<s>azz</s>"[:-4] + "<pad>" * 3
    assert decode(sample.labels) == "azz</s>" + "<pad>" * 3
    assert sample.loss_mask.tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert sample.position_ids.tolist() == list(range(7))


def test_packed_samples_have_boundaries_and_positions(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(1, 2, 1))
    splits = open_sft(tmp_path, tokenizer, files=[str(file)], seq_length=8, packed_sequence=True)
    samples = [splits.train.samples.at(position) for position in range(2)]
    by_number = {len(sample.cu_seqlens): sample for sample in samples if sample.cu_seqlens is not None}
    sizes = {tuple(sample.cu_seqlens.tolist()) for sample in samples if sample.cu_seqlens is not None}
    assert sizes == {(0, 4, 7, 8), (0, 3, 8)}
    for sample in samples:
        assert sample.cu_seqlens is not None
        lengths = np.diff(sample.cu_seqlens)
        assert sample.position_ids.tolist() == [place for length in lengths for place in range(length)]
    full = by_number[4]
    assert full.loss_mask.tolist() == [0, 1, 1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("too_long", "letters", "said"),
    [
        ("truncate", ["a", "b", "c"], "4 records: 2 cut, 0 too long and left out, 1 left out because the cut took all"),
        ("drop", ["a"], "4 records: 0 cut, 3 too long and left out, 0 left out"),
    ],
)
def test_records_that_are_too_long_are_counted(
    too_long: str, letters: list[str], said: str, tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [*pairs(2, 50, 60), {"prompt": "d" * 30, "completion": "z"}]
    file = write_lines(tmp_path / "a.jsonl", records)
    with caplog.at_level(logging.INFO):
        splits = open_sft(tmp_path, tokenizer, files=[str(file)], seq_length=20, too_long=too_long)
    assert epoch_of(splits.train) == letters
    assert said in caplog.text


def test_records_that_are_too_long_can_be_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(2, 50))
    message = r"1 of 2 records are longer than dataset\.seq_length=20; the first is record 1, .*with 53 tokens"
    with pytest.raises(ConfigError, match=message):
        open_sft(tmp_path, tokenizer, files=[str(file)], seq_length=20, too_long="refuse")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', r"a\.jsonl:3: not JSON \(.*column 1\d\)"),
        ("[1]", r"a\.jsonl:3: the start of a list, where each line is to be a JSON object"),
        ("[", r"a\.jsonl:3: the start of a list, .* write one a line, as `jq -c"),
        ("1", r"a\.jsonl:3: a int, not a JSON object"),
        ('{"text": "x"}', r"a\.jsonl:3: the keys are text; known are messages"),
        ('{"messages": [{"role": "user", "content": 5}]}', r"a\.jsonl:3: the content of message 0 must be text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"a\.jsonl:3: no message of the assistant"),
    ],
)
def test_a_broken_line_is_named(line: str, message: str, tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [*pairs(2), "", line, *pairs(3)])
    with pytest.raises(ConfigError, match=message):
        open_sft(tmp_path, tokenizer, files=[str(file)])
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{% for m in messages %}{{ m.content", r"no Jinja: line 1: "),
        ("{{ raise_exception('no system turn') }}", r"a\.jsonl:1: the chat template refuses .*\(no system turn\)"),
    ],
)
def test_a_template_that_is_none_or_refuses(chat_template: str, message: str, tmp_path: Path, tokenizer: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    config = ConfigContainer()
    config.dataset.kind, config.dataset.cache_dir = "sft", str(tmp_path / "cache")
    config.dataset.files = [str(write_lines(tmp_path / "a.jsonl", [{"messages": turns}]))]
    config.tokenizer.chat_template = chat_template
    with pytest.raises(ConfigError, match=message):
        open_splits(config, vocab_size=VOCAB_SIZE, tokenizer_folder=lambda: str(tokenizer))


def test_a_file_without_records_is_named(tmp_path: Path, tokenizer: Path) -> None:
    file, empty = write_lines(tmp_path / "a.jsonl", pairs(2)), write_lines(tmp_path / "none.jsonl", ["", ""])
    with pytest.raises(ConfigError, match=r"validation: there are no records in .*none\.jsonl"):
        open_sft(tmp_path, tokenizer, files=[str(file)], validation_files=[str(empty)])


def test_bytes_that_are_no_text_are_named(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"\xff"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not UTF-8 \(byte 2"):
        open_sft(tmp_path, tokenizer, files=[str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("kind", "num_samples", "packed", "message"),
    [
        ("sft", 3, False, r"3 samples to train on, fewer than train\.global_batch_size=4: .* lower the batch"),
        ("sft", 1, True, r"1 samples to train on \(packed; a lower dataset\.seq_length makes more of them\), fewer"),
        ("sft", 4, False, None),
        ("text", 3, False, None),
        ("sft", None, False, None),
    ],
)
def test_fewer_samples_than_a_batch(kind: str, num_samples: int | None, packed: bool, message: str | None) -> None:
    config = ConfigContainer()
    config.dataset.kind, config.dataset.packed_sequence, config.train.global_batch_size = kind, packed, 4
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_samples_fill_a_batch(config, num_samples)


def test_a_token_that_the_model_has_not(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(2))
    config = ConfigContainer()
    config.dataset.kind, config.dataset.files, config.dataset.cache_dir = "sft", [str(file)], str(tmp_path / "cache")
    with pytest.raises(ConfigError, match="the model has 100"):
        open_splits(config, vocab_size=100, tokenizer_folder=lambda: str(tokenizer))


def test_splits_of_files(tmp_path: Path, tokenizer: Path) -> None:
    files = [
        write_lines(tmp_path / f"{n}.jsonl", [{"prompt": letter, "completion": "z"}]) for n, letter in enumerate("abc")
    ]
    names = [str(file) for file in files]
    splits = open_sft(tmp_path, tokenizer, files=names[:1], validation_files=names[1:2], test_files=names[2:])
    assert [epoch_of(split) for split in (splits.train, splits.validation, splits.test)] == [["a"], ["b"], ["c"]]
    alone = open_sft(tmp_path, tokenizer, files=names)
    assert epoch_of(alone.train) == ["a", "b", "c"]
    assert (alone.validation, alone.test) == (None, None)


@pytest.mark.parametrize("packed", [False, True])
def test_shares_part_the_records(packed: bool, tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(*[1] * 20))
    given: dict[str, Any] = {"val_proportion": 0.2, "test_proportion": 0.1, "seq_length": 3, "packed_sequence": packed}
    first, again = (open_sft(tmp_path, tokenizer, files=[str(file)], **given) for _ in range(2))
    parts = [epoch_of(split) for split in (first.train, first.validation, first.test)]
    assert [len(part) for part in parts] == [14, 4, 2]
    assert sorted(letter for part in parts for letter in part) == sorted(chr(ord("a") + n) for n in range(20))
    assert parts == [epoch_of(split) for split in (again.train, again.validation, again.test)]


def test_a_share_of_nothing_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(1, 2))
    with pytest.raises(ConfigError, match=r"0\.1 of 2 records is none"):
        open_sft(tmp_path, tokenizer, files=[str(file)], val_proportion=0.1)


def test_tokens_are_made_once_whatever_the_length(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(5, 6))
    for length in (4, 20):
        open_sft(tmp_path, tokenizer, files=[str(file)], seq_length=length)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    open_sft(tmp_path, tokenizer, files=[str(file)], prompt_template="Q: {input} A: {output}")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_chat_template_of_ones_own(tmp_path: Path, tokenizer: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    file = write_lines(tmp_path / "a.jsonl", [{"messages": turns}])
    (tmp_path / "own.jinja").write_text(template("instruct", marked=False))
    config = ConfigContainer()
    config.dataset.kind, config.dataset.files, config.dataset.cache_dir = "sft", [str(file)], str(tmp_path / "cache")
    for own in (str(tmp_path / "own.jinja"), template("instruct", marked=True)):
        config.tokenizer.chat_template = own
        splits = open_splits(config, vocab_size=VOCAB_SIZE, tokenizer_folder=lambda: str(tokenizer))
        sample = splits.train.samples.at(0)
        assert character_tokenizer().decode(sample.labels[sample.loss_mask > 0]) == "r</s>"
    config.tokenizer.chat_template = "nowhere.jinja"
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template='nowhere\.jinja' is neither"):
        open_splits(config, vocab_size=VOCAB_SIZE, tokenizer_folder=lambda: str(tokenizer))


def make_store(lengths: list[int]) -> tuple[SftStore, Rows]:
    """Records of `lengths` positions whose tokens are all the record's number."""
    starts = np.cumsum([0, *(length + 1 for length in lengths)])
    tokens = np.repeat(np.arange(len(lengths), dtype=np.int32), [length + 1 for length in lengths])
    record = StoreRecord(1, "", 10**6, 0, len(lengths), len(tokens))
    return SftStore(tokens, np.ones(len(tokens), dtype=np.uint8), starts, record), Rows(starts[:-1], starts[1:])


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=15),
    packed=st.booleans(),
    ranks=st.integers(1, 3),
    per_rank=st.integers(1, 3),
    step=st.integers(0, 4),
)
def test_every_layout_sees_the_same_global_batch(
    lengths: list[int], packed: bool, ranks: int, per_rank: int, step: int
) -> None:
    store, rows = make_store(lengths)
    kind = PackedSftSamples if packed else SftSamples

    def seen(size: int) -> list[list[int]]:
        batches = Batches(kind(store, rows, seq_length=8, seed=3), micro_batch_size=1, global_batch_size=total)
        parts = [
            batches.of_step(consumed_samples=step * total, data_parallel_rank=rank, data_parallel_size=size)
            for rank in range(size)
        ]
        return [batch.tokens[0].tolist() for turn in zip(*parts, strict=True) for batch in turn]

    total = ranks * per_rank
    assert seen(ranks) == seen(1)


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_has_every_record_once(packed: bool) -> None:
    store, rows = make_store([3, 1, 6, 2, 2, 5, 4])
    samples = (PackedSftSamples if packed else SftSamples)(store, rows, seq_length=8, seed=3)
    for epoch in range(2):
        at = range(epoch * samples.num_samples, (epoch + 1) * samples.num_samples)
        seen = np.concatenate([sample.tokens[sample.loss_mask > 0] for sample in map(samples.at, at)])
        assert sorted(seen.tolist()) == sorted(np.repeat(range(7), [3, 1, 6, 2, 2, 5, 4]).tolist())


def test_a_folder_and_a_saved_data_set_of_the_library(tmp_path: Path, tokenizer: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", pairs(1, 1))
    write_lines(folder / "test.jsonl", [{"prompt": "t", "completion": "z"}])
    splits = open_sft(tmp_path, tokenizer, dataset_name=str(folder))
    assert [epoch_of(splits.train), epoch_of(splits.test), splits.validation] == [["a", "b"], ["t"], None]
    datasets.Dataset.from_list([*pairs(1, 1, 1), {"prompt": None, "completion": None}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="saved, split train, row 3: the keys are none"):
        open_sft(tmp_path, tokenizer, dataset_name=str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_sft(tmp_path, tokenizer, dataset_name=str(tmp_path / "nowhere"))


def test_json_of_the_cache_says_what_it_is(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", pairs(1, 1))
    open_sft(tmp_path, tokenizer, files=[str(file)])
    (index,) = (tmp_path / "cache").rglob("index.json")
    record = json.loads(index.read_text())
    assert (record["num_records"], record["num_tokens"]) == (2, 8)
    index.write_text(json.dumps(record | {"num_tokens": 3}))
    with pytest.raises(ConfigError, match="are damaged: remove the folder"):
        open_sft(tmp_path, tokenizer, files=[str(file)])
