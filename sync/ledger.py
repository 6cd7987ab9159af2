"""The ledger of a version on its way: which chunks are missing, and which tensors are complete and right. Pure.

    plan = plan_ledger(names, layouts, waits_for)        # once for a layout
    ledger = Ledger(plan)
    ledger.add([key], [0, 3], owners, digests)           # chunks are here: tensor and digest of each of their pieces
    ledger.seal(wanted)                                  # before or after the last chunk
    ledger.take_wrong(); ledger.is_whole

A tensor's digest is the sum of its pieces' digests (`digest`). It is looked at when all chunks that it waits for are
here and the digests that the sources announced are known.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from weightcast.sync.digest import MASK
from weightcast.sync.layout import SourceLayout

ChunkKey: TypeAlias = tuple[int, int]
"""(source rank, index)."""


@dataclass(frozen=True, slots=True)
class LedgerPlan:
    """What does not change from version to version. Tensors go by their numbers in `names`."""

    names: tuple[str, ...]
    numbers: Mapping[str, int]
    owners_of: Mapping[ChunkKey, tuple[int, ...]]
    """Of each chunk that is asked for, by piece, the tensor that it is of."""
    tensors_of: Mapping[ChunkKey, tuple[int, ...]]
    """The tensors whose digests wait for a chunk."""
    chunks_of: tuple[tuple[ChunkKey, ...], ...]
    """Of each tensor, the chunks that it waits for."""


def plan_ledger(
    names: Sequence[str],
    layouts: Mapping[int, SourceLayout],
    order: Mapping[int, Iterable[int]],
    waits_for: Mapping[ChunkKey, Iterable[str]] | None = None,
) -> LedgerPlan:
    """Of the chunks in `order`, by rank. `waits_for` says which tensors wait for which chunk, where it is not all."""
    numbers = {name: number for number, name in enumerate(names)}
    owners_of = {
        (rank, index): tuple(numbers[piece.region.name] for piece in layouts[rank].chunks[index].pieces)
        for rank, indices in order.items()
        for index in indices
    }
    if waits_for is None:
        tensors_of = {key: tuple(dict.fromkeys(owners)) for key, owners in owners_of.items()}
    else:
        tensors_of = {key: tuple(numbers[name] for name in found) for key, found in waits_for.items()}
    chunks_of: list[list[ChunkKey]] = [[] for _ in names]
    for key, tensors in tensors_of.items():
        for number in tensors:
            chunks_of[number].append(key)
    return LedgerPlan(tuple(names), numbers, owners_of, tensors_of, tuple(map(tuple, chunks_of)))


class Ledger:
    """See the module. `late` chunks are missing from `open_late` on; `unwanted` tensors are never looked at."""

    def __init__(self, plan: LedgerPlan, late: Collection[ChunkKey] = (), unwanted: Iterable[str] = ()) -> None:
        self.plan = plan
        self.missing = set(plan.tensors_of)
        self.missing.difference_update(late)
        self.num_checked = 0
        """Tensors that were found right."""
        self._sums = [0] * len(plan.names)
        self._left = [len(keys) for keys in plan.chunks_of]
        self._unchecked = set(range(len(plan.names)))
        self._unchecked.difference_update(plan.numbers[name] for name in unwanted)
        self._wanted: list[int] | None = None
        self._given: dict[ChunkKey, tuple[Sequence[int], Sequence[int]]] = {}
        self._wrong: dict[int, bool] = {}  # and whether it was told

    @property
    def is_sealed(self) -> bool:
        """Whether the sources' digests are known."""
        return self._wanted is not None

    @property
    def is_whole(self) -> bool:
        """Whether every chunk is here and every digest was right."""
        return self.is_sealed and not self.missing and not self._unchecked

    def open_late(self, keys: Iterable[ChunkKey]) -> None:
        """From now on these are missing."""
        self.missing.update(keys)

    def add(
        self, keys: Sequence[ChunkKey], firsts: Sequence[int], owners: Sequence[int], digests: Sequence[int]
    ) -> None:
        """Missing chunks are here, with so many pieces: those of `keys[n]` from `firsts[n]` to `firsts[n + 1]`."""
        sums, left = self._sums, self._left
        for number, digest in zip(owners, digests, strict=True):
            sums[number] += digest
        self.missing.difference_update(keys)
        for key, first, end in zip(keys, firsts, firsts[1:], strict=False):
            self._given[key] = owners[first:end], digests[first:end]
            for number in self.plan.tensors_of[key]:
                left[number] -= 1
                if not left[number]:
                    self._check(number)

    def seal(self, digests: list[int]) -> None:
        """The digest that each tensor must have."""
        self._wanted = digests
        for number in range(len(digests)):
            self._check(number)

    def _check(self, number: int) -> None:
        """The digest is that of the bytes which were written, piece by piece: it vouches for what the engine gets."""
        if self._wanted is None or self._left[number] or number not in self._unchecked or number in self._wrong:
            return
        if self._sums[number] & MASK == self._wanted[number]:
            self._unchecked.remove(number)
            self.num_checked += 1
        else:
            self._wrong[number] = False

    def take_wrong(self) -> list[str]:
        """Tensors that are complete and have another digest than announced, each named once."""
        wrong = [number for number, is_told in self._wrong.items() if not is_told]
        self._wrong |= dict.fromkeys(wrong, True)
        return [self.plan.names[number] for number in wrong]

    def digests_of(self, name: str) -> tuple[int, int]:
        """(the digest of a tensor as it came, the one that was announced), once it is sealed."""
        assert self._wanted is not None
        number = self.plan.numbers[name]
        return self._sums[number] & MASK, self._wanted[number]

    def reopen(self, names: Iterable[str]) -> list[ChunkKey]:
        """Want the chunks of these tensors again; those that are wanted already are not named once more."""
        found = (key for name in names for key in self.plan.chunks_of[self.plan.numbers[name]])
        keys = list(dict.fromkeys(key for key in found if key not in self.missing))
        for key in keys:
            for number, digest in zip(*self._given.pop(key), strict=True):
                self._sums[number] -= digest
            for number in self.plan.tensors_of[key]:
                self._left[number] += 1
                self._unchecked.add(number)
                self._wrong.pop(number, None)
        self.missing.update(keys)
        return keys
