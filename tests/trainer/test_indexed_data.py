"""Indexed datasets: written as Megatron's tool writes them, read by its reader, trained on in its order."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.ranks import run_ranks
from tests.trainer.runs import train_all
from tests.trainer.sft_files import character_tokenizer, write_lines
from typer.testing import CliRunner

from weightcast.cli import app
from weightcast.sync.errors import ConfigError, StorageError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.indexed.preprocess import PreprocessSettings, preprocess
from weightcast.trainer.data.indexed.samples import open_indexed, read_blend
from weightcast.trainer.data.samples import Samples

# After weightcast, which holds back Megatron's import-time notices.
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # isort: skip
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # isort: skip
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder  # isort: skip

SEQ_LENGTH = 8
EOS = character_tokenizer().eos_token_id


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron 0.19 warns where neither a process group nor the environment tells it its rank."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def documents(count: int, seed: int) -> list[dict[str, str]]:
    draw = np.random.default_rng(seed)
    return [{"text": "".join(draw.choice(list("abcdé "), draw.integers(0, 40)))} for _ in range(count)]


def by_megatrons_tool(lines: list[dict[str, Any]], prefix: str) -> None:
    """The steps of Megatron-LM's tools/preprocess_data.py with --append-eod, in one process."""
    tokenizer = character_tokenizer()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    for line in lines:
        ids, lengths = [], []
        for sentence in line["text"] if isinstance(line["text"], list) else [line["text"]]:
            found = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            if found:
                ids.extend(found)
                lengths.append(len(found))
        if ids:
            ids.append(EOS)
            lengths[-1] += 1
        builder.add_document(np.array(ids, dtype=np.int64), lengths)
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_those_of_megatrons_tool(workers: int, tmp_path: Path, tokenizer: str) -> None:
    lines: list[dict[str, Any]] = [*documents(150, seed=1), {"text": ["ab", "", "c"]}, {"text": ""}, {"text": []}]
    inputs = [write_lines(tmp_path / "a.jsonl", lines[:70]), write_lines(tmp_path / "b.jsonl", lines[70:])]
    by_megatrons_tool(lines, str(tmp_path / "theirs"))
    seen: list[int] = []
    report = preprocess(inputs, tmp_path / "ours", tokenizer, PreprocessSettings(workers=workers), seen.append)
    (prefix,) = report.prefixes
    assert prefix == tmp_path / "ours_text_document"
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(prefix))
    assert (len(read.document_indices) - 1, int(read.sequence_lengths.sum())) == (153, report.num_tokens)
    assert report.num_empty == sum(not "".join(line["text"]) for line in lines)
    assert sum(seen) == sum(len("".join(line["text"]).encode()) for line in lines)
    assert not list(tmp_path.glob("*making*"))


def test_several_keys_are_several_datasets(tmp_path: Path, tokenizer: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"q": "ab", "a": "c"}, {"q": "d", "a": "ef"}])
    settings = PreprocessSettings(json_keys=("q", "a"), append_eod=False)
    report = preprocess([file], tmp_path / "x", tokenizer, settings)
    decode = character_tokenizer().decode
    texts = [[decode(row) for row in IndexedDataset(str(prefix))] for prefix in report.prefixes]
    assert texts == [["ab", "d"], ["c", "ef"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2: not JSON"),
        ({"body": "x"}, r"a\.jsonl:2: no text under 'text'; the keys are body: name one with --json-keys"),
        ({"text": 5}, r"a\.jsonl:2: no text under 'text'"),
    ],
)
def test_a_broken_line_is_named_and_leaves_nothing(line: Any, message: str, tmp_path: Path, tokenizer: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, line])
    with pytest.raises(ConfigError, match=message):
        preprocess([file], tmp_path / "out" / "x", tokenizer, PreprocessSettings())
    assert not list((tmp_path / "out").iterdir())


def test_no_text_and_no_place(tmp_path: Path, tokenizer: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(ConfigError, match="no text in"):
        preprocess([file], tmp_path / "x", tokenizer, PreprocessSettings())
    with pytest.raises(StorageError, match=r"a\.jsonl"):
        preprocess([file], file / "x", tokenizer, PreprocessSettings())


@pytest.fixture(scope="module")
def prefixes(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two datasets."""
    out = tmp_path_factory.mktemp("indexed")
    made = []
    for seed in (1, 2):
        file = write_lines(out / f"{seed}.jsonl", documents(60 * seed, seed))
        made += preprocess([file], out / str(seed), tokenizer, PreprocessSettings()).prefixes
    return [str(prefix) for prefix in made]


def open_ours(tmp_path: Path, *, vocab_size: int = 1000, **settings: Any) -> list[Samples | None]:
    config = ConfigContainer()
    config.dataset.seq_length, config.train.train_iters, config.train.global_batch_size = SEQ_LENGTH, 40, 10
    for name, value in settings.items():
        setattr(config.dataset, name, value)
    return list(open_indexed(config, tmp_path / "cache", vocab_size=vocab_size))


def open_theirs(sizes: list[int | None], **settings: Any) -> list[Any]:
    """By Megatron's own builder."""
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQ_LENGTH,
        path_to_cache=None,  # it would ask for a process group
        tokenizer=type("Tokenizer", (), {"eod": None, "vocab_size": None, "unique_identifiers": {}})(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **settings,
    )
    return list(BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build())


def rows(dataset: Any, count: int) -> list[list[int]]:
    return [dataset[at]["tokens"].tolist() for at in range(count)]


def ours(samples: Samples | None, count: int) -> list[list[int]]:
    assert samples is not None
    return [samples.at(at).tokens.tolist() for at in range(count)]


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
@pytest.mark.parametrize("count", [1, 2])
def test_samples_are_those_of_megatrons_builder(
    count: int, weights: list[float] | None, tmp_path: Path, prefixes: list[str]
) -> None:
    chosen, given = prefixes[:count], None if weights is None else weights[:count]
    path = chosen if given is None else [str(part) for pair in zip(given, chosen, strict=True) for part in pair]
    train, validation, test = open_ours(tmp_path, data_path=path, split="8,1,1")
    alone = count == 1 and weights is None
    sizes: list[int | None] = [400, None, None] if alone else [400, 10, 10]
    theirs = open_theirs(sizes, blend=(chosen, given), split="8,1,1")
    assert train is not None and (train.num_samples or 0) > 300
    assert ours(train, min(400, train.num_samples or 0)) == rows(theirs[0], min(400, len(theirs[0])))
    if alone:
        assert validation is not None and test is not None
        assert ours(validation, validation.num_samples or 0) == rows(theirs[1], len(theirs[1]))
        assert ours(test, test.num_samples or 0) == rows(theirs[2], len(theirs[2]))
    else:  # every document once, where Megatron takes as many samples as it is asked for
        parts = [open_ours(tmp_path, data_path=[prefix], split="8,1,1")[1] for prefix in chosen]
        assert validation is not None
        assert validation.num_samples == sum(samples.num_samples or 0 for samples in parts if samples is not None)


def test_a_row_is_tokens_and_the_ones_that_follow(tmp_path: Path, prefixes: list[str]) -> None:
    train, validation, test = open_ours(tmp_path, data_path=prefixes[:1])
    assert train is not None
    row = train.at(3)
    assert row.tokens[1:].tolist() == row.labels[:-1].tolist()
    assert row.loss_mask.tolist() == [1.0] * SEQ_LENGTH
    assert row.position_ids.tolist() == list(range(SEQ_LENGTH))
    assert (validation, test) == (None, None)


def test_splits_of_their_own_datasets(tmp_path: Path, prefixes: list[str]) -> None:
    train, validation, test = open_ours(tmp_path, train_data_path=prefixes[:1], valid_data_path=prefixes[1:])
    whole = open_ours(tmp_path, data_path=prefixes[:1])[0]
    assert ours(train, 50) == ours(whole, 50)
    assert validation is not None and validation.num_samples is not None and validation.num_samples > 100
    assert test is None


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, prefixes: list[str], tokenizer: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no file '.*nowhere\.bin'"):
        read_blend(["nowhere"])
    with pytest.raises(ConfigError, match="weight, path, weight, path"):
        read_blend(["0.3", prefixes[0], prefixes[1]])
    train = open_ours(tmp_path, data_path=prefixes[:1], vocab_size=20)[0]
    assert train is not None
    with pytest.raises(ConfigError, match=re.escape(prefixes[0])):
        for position in range(50):
            train.at(position)
    file = write_lines(tmp_path / "short.jsonl", [{"text": "a"}])
    (short,) = preprocess([file], tmp_path / "short", tokenizer, PreprocessSettings()).prefixes
    with pytest.raises(ConfigError, match="has not one sample of 8 tokens"):
        open_ours(tmp_path, data_path=[str(short)])


def test_preprocess_and_train(qwen3: Path, tmp_path: Path) -> None:
    """The command, and a run on what it says, in two layouts."""
    words = [{"text": " ".join(f"w{3 + (start + step) % 50}" for step in range(40))} for start in range(30)]
    file = write_lines(tmp_path / "a.jsonl", words)
    command = ["preprocess", str(file), "--tokenizer", str(qwen3), "--out", str(tmp_path / "a"), "--workers", "2"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    assert "30 documents, 1230 tokens" in said.output
    path = json.dumps([f"{tmp_path}/a_text_document"])
    assert f"dataset.kind=indexed dataset.data_path=[{tmp_path}/a_text_document]" in said.output
    shared = [f"model.hf_path={qwen3}", "dataset.kind=indexed", f"dataset.data_path={path}", "dataset.split=8,1,1"]
    shared += [f"dataset.cache_dir={tmp_path / 'cache'}", "dataset.seq_length=16", "train.train_iters=4"]
    shared += ["optimizer.lr=2e-3"]
    first, _ = run_ranks(train_all, 2, {"TP2": [*shared, "model.tensor_model_parallel_size=2"], "DP2": shared})
    assert first["TP2"]["losses"] == pytest.approx(first["DP2"]["losses"], abs=1e-5)
    assert first["TP2"]["losses"][-1] < first["TP2"]["losses"][0] - 0.05
