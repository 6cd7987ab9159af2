"""Shares of training, validation and test; none has a sample of another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.test_data import make_stream

import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)
from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.split_shares import parse_split, split_ranges
from weightcast.trainer.data.text_samples import text_splits

# After weightcast, which holds back Megatron's import-time notices.
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split  # isort: skip


@pytest.mark.parametrize(
    ("split", "items", "ranges"),
    [
        ("9999,8,2", 10009, [(0, 9999), (9999, 10007), (10007, 10009)]),
        ("8,1,1", 20, [(0, 16), (16, 18), (18, 20)]),
        ("1", 7, [(0, 7), (7, 7), (7, 7)]),
        ("0.5,0.5", 5, [(0, 2), (2, 5), (5, 5)]),
    ],
)
def test_ranges(split: str, items: int, ranges: list[tuple[int, int]]) -> None:
    assert split_ranges(split, items) == ranges


@given(shares=st.lists(st.integers(0, 999), min_size=1, max_size=3).filter(lambda shares: shares[0] > 0))
def test_shares_are_read_as_megatron_reads_them(shares: list[int]) -> None:
    split = ",".join(map(str, shares))
    assert parse_split(split) == pytest.approx(parse_and_normalize_split(split))


@given(shares=st.tuples(*[st.integers(1, 99)] * 3), items=st.integers(0, 10**6))
def test_ranges_are_end_to_end(shares: tuple[int, ...], items: int) -> None:
    ranges = split_ranges(",".join(map(str, shares)), items)
    assert [place for pair in ranges for place in pair][1:-1:2] == [pair[0] for pair in ranges[1:]]
    assert (ranges[0][0], ranges[-1][1]) == (0, items)


@pytest.mark.parametrize("split", ["", "a,b", "0,1", "1,-1", "1,2,3,4", "inf"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 9999,8,2"):
        parse_split(split)


def test_splits_of_text_share_nothing() -> None:
    splits = text_splits(make_stream(4 * 20 + 1, [0]), seq_length=4, seed=1, split="8,1,1")
    seen = []
    for samples, count in zip(splits, (16, 2, 2), strict=True):
        assert samples is not None and samples.num_samples == count
        seen += [int(samples.at(position).tokens[0]) for position in range(count)]
    assert sorted(seen) == list(range(0, 80, 4))
    assert text_splits(make_stream(81, [0]), seq_length=4, seed=1, split=None)[1:] == (None, None)
    with pytest.raises(ConfigError, match="leaves none of 1 samples"):
        text_splits(make_stream(5, [0]), seq_length=4, seed=1, split="1,9")
