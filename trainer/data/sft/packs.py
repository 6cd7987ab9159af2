"""Which rows share a sequence: first-fit decreasing, the same packs for the same lengths. Pure.

The longest row comes first, each goes into the first pack that has room for it. A tree of the room that packs have
left finds that pack in log(packs) steps, so a million rows take seconds.

    first_fit_decreasing([3, 9, 4, 6], 10)  # [[1], [3, 2], [0]]
"""

from collections.abc import Sequence

import numpy as np


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths`, in packs of at most `capacity`; rows of one length in their order.

    Raises `ValueError` for a length of 0 or less, or above `capacity`.
    """
    if len(lengths) and not 0 < min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} do not fit packs of {capacity}")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    tree = _RoomTree(len(lengths), capacity)
    packs: list[list[int]] = []
    for index in order.tolist():
        place = tree.first_with(lengths[index])
        if place == len(packs):
            packs.append([])
        packs[place].append(index)
        tree.take(place, lengths[index])
    return packs


class _RoomTree:
    """The room left in each pack, and at every node above them the most there is below it; packs start empty."""

    def __init__(self, num_packs: int, capacity: int) -> None:
        self._size = 1 << max(num_packs - 1, 0).bit_length()
        self._most = [capacity] * (2 * self._size)

    def first_with(self, room: int) -> int:
        """The first pack with at least `room` left; one that is empty always has."""
        node = 1
        while node < self._size:
            node = 2 * node if self._most[2 * node] >= room else 2 * node + 1
        return node - self._size

    def take(self, place: int, room: int) -> None:
        """Take `room` of the pack at `place`."""
        node = place + self._size
        self._most[node] -= room
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
