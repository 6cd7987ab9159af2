"""Mock data: deterministic, within the vocabulary, learnable, and trained on without files or tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ranks import run_ranks
from tests.trainer.runs import train_all

from weightcast.trainer.data.mock import RESTART_EVERY, MockSamples


@given(
    vocab_size=st.integers(2, 5000), seq_length=st.integers(1, 64), seed=st.integers(0, 99), at=st.integers(0, 10**12)
)
def test_a_sample_depends_on_seed_and_position_alone(vocab_size: int, seq_length: int, seed: int, at: int) -> None:
    def sample() -> list[list[int]]:
        row = MockSamples(vocab_size=vocab_size, seq_length=seq_length, seed=seed).at(at)
        return [row.tokens.tolist(), row.labels.tolist()]

    tokens, labels = sample()
    assert sample() == [tokens, labels]
    assert len(tokens) == seq_length
    assert tokens[1:] == labels[:-1]
    assert all(0 <= token < vocab_size for token in (*tokens, *labels))


def test_splits_and_seeds_have_samples_of_their_own() -> None:
    def first(seed: int, split: int) -> tuple[int, ...]:
        return tuple(MockSamples(vocab_size=500, seq_length=64, seed=seed, split=split).at(0).tokens.tolist())

    assert len({first(seed, split) for seed in (1, 2) for split in (0, 1, 2)}) == 6


def test_what_follows_a_token_can_be_learned_from_other_splits() -> None:
    """A table of successors counted on one split foretells about 7 in 8 tokens of another."""
    train, held_out = (MockSamples(vocab_size=10**5, seq_length=256, seed=3, split=split) for split in (0, 1))
    counts = np.zeros((512, 512), dtype=np.int64)
    for position in range(200):
        row = train.at(position)
        np.add.at(counts, (row.tokens, row.labels), 1)
    rows = [held_out.at(position) for position in range(20)]
    hits = np.mean([np.mean(counts[row.tokens].argmax(axis=1) == row.labels) for row in rows])
    assert 1 - 1.5 / RESTART_EVERY < hits < 1 - 0.5 / RESTART_EVERY


@pytest.fixture
def without_tokenizer(qwen3: Path, tmp_path: Path) -> Path:
    """The model's folder, with nothing in it that says how text becomes tokens."""
    return Path(shutil.copytree(qwen3, tmp_path / "model", ignore=shutil.ignore_patterns("*token*")))


def test_training_on_it_needs_no_file_and_lowers_the_loss(without_tokenizer: Path) -> None:
    words = [f"model.hf_path={without_tokenizer}", "dataset.kind=mock", "dataset.seq_length=32", "train.train_iters=12"]
    words += ["train.micro_batch_size=4", "optimizer.lr=1e-2", "train.global_batch_size=16"]
    (found,) = run_ranks(train_all, 1, {"mock": words}, timeout_s=120, process_group=False)
    losses = found["mock"]["losses"]
    assert losses[0] == pytest.approx(np.log(131), abs=0.5), json.dumps(found)
    assert losses[-1] < losses[0] - 0.5
