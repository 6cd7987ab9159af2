"""First-fit decreasing: every row once, no pack too full, no pack that could have been left out by first fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcast.trainer.data.sft.packs import first_fit_decreasing

LENGTHS = st.lists(st.integers(1, 20), max_size=60)


def by_the_book(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same by trying every pack."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = (pack for pack in packs if sum(lengths[i] for i in pack) + lengths[index] <= capacity)
        pack = next(room, None)
        if pack is None:
            packs.append([index])
        else:
            pack.append(index)
    return packs


@given(lengths=LENGTHS, spare=st.integers(0, 30))
def test_packs_are_those_of_first_fit_decreasing(lengths: list[int], spare: int) -> None:
    capacity = max(lengths, default=1) + spare
    packs = first_fit_decreasing(lengths, capacity)
    assert packs == by_the_book(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))


def test_an_example() -> None:
    assert first_fit_decreasing([3, 9, 4, 6], 10) == [[1], [3, 2], [0]]
    assert first_fit_decreasing([], 10) == []


@pytest.mark.parametrize("lengths", [[11], [0], [3, -1]])
def test_lengths_that_fit_no_pack(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit packs of 10"):
        first_fit_decreasing(lengths, 10)
