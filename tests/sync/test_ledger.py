"""The ledger of a version on its way, against sums that are made anew for each question."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.sync.digest import MASK
from weightcast.sync.ledger import ChunkKey, Ledger, LedgerPlan

NUM_TENSORS = 4
DIGESTS = st.integers(0, MASK)


@dataclass
class Book:
    """What the ledger should say: the digest of each piece that is here, by its chunk."""

    owners_of: dict[ChunkKey, tuple[int, ...]]
    here: dict[ChunkKey, list[int]] = field(default_factory=dict)

    def keys_of(self, number: int) -> list[ChunkKey]:
        return [key for key, owners in self.owners_of.items() if number in owners]

    def is_complete(self, number: int) -> bool:
        return all(key in self.here for key in self.keys_of(number))

    def digest(self, number: int) -> int:
        pairs = (pair for key, found in self.here.items() for pair in zip(self.owners_of[key], found, strict=True))
        return sum(digest for owner, digest in pairs if owner == number) & MASK


@st.composite
def books(draw: st.DrawFn) -> Book:
    owners = st.lists(st.integers(0, NUM_TENSORS - 1), min_size=1, max_size=4).map(lambda found: tuple(sorted(found)))
    return Book({(0, index): draw(owners) for index in range(draw(st.integers(1, 6)))})


def make_plan(book: Book) -> LedgerPlan:
    names = tuple("abcd")
    tensors_of = {key: tuple(dict.fromkeys(owners)) for key, owners in book.owners_of.items()}
    chunks_of = tuple(tuple(book.keys_of(number)) for number in range(NUM_TENSORS))
    return LedgerPlan(names, {name: n for n, name in enumerate(names)}, book.owners_of, tensors_of, chunks_of)


@PROPERTY
@given(st.data())
def test_a_version_is_whole_when_all_is_here_and_right_and_names_what_is_wrong_once(data: st.DataObject) -> None:
    book = data.draw(books())
    ledger, keys = Ledger(make_plan(book)), list(book.owners_of)
    right = {key: [data.draw(DIGESTS) for _ in owners] for key, owners in book.owners_of.items()}
    wanted = [Book(book.owners_of, right).digest(number) for number in range(NUM_TENSORS)]
    sealed_at = data.draw(st.integers(0, len(keys)))
    spoilt = {key for key in keys if data.draw(st.booleans())}
    start = 0
    while start < len(keys):
        if start >= sealed_at and not ledger.is_sealed:
            ledger.seal(wanted)
        count = data.draw(st.integers(1, len(keys) - start))
        run = keys[start : start + count]
        start += count
        for key in run:
            book.here[key] = [digest ^ 1 if key in spoilt else digest for digest in right[key]]
        owners = [owner for key in run for owner in book.owners_of[key]]
        firsts = [0]
        for key in run:
            firsts.append(firsts[-1] + len(book.owners_of[key]))
        ledger.add(run, firsts, owners, [digest for key in run for digest in book.here[key]])
        assert ledger.missing == set(keys) - set(book.here)
    if not ledger.is_sealed:
        ledger.seal(wanted)
    wrong = [name for n, name in enumerate("abcd") if book.digest(n) != wanted[n]]
    assert sorted(ledger.take_wrong()) == wrong and ledger.take_wrong() == []
    assert ledger.is_whole == (not wrong) and ledger.num_checked == NUM_TENSORS - len(wrong)
    for name in wrong:
        number = ledger.plan.numbers[name]
        assert ledger.digests_of(name) == (book.digest(number), wanted[number])
    again = ledger.reopen(wrong)
    assert sorted(again) == sorted({key for name in wrong for key in ledger.plan.chunks_of[ledger.plan.numbers[name]]})
    assert ledger.missing == set(again) and ledger.reopen(wrong) == []
    for key in again:
        ledger.add([key], (0, len(right[key])), book.owners_of[key], right[key])
    assert ledger.is_whole or spoilt - set(again), "what is not fetched again stays as it was"
