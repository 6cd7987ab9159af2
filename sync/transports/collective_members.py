"""Which engines could take part in a source's broadcasts: what they say in its store, and whether they live.

members = Members(rendezvous, lost_after_s)        # source
members.look(time.monotonic())                     # those that show signs of life, and what they want

number, will = enrol(rendezvous, will)             # engine: its number, under which it speaks again
say(rendezvous, number, will)
leave(rendezvous, number)
"""

from dataclasses import replace

from weightcast.sync.transports.collective_group import Rendezvous
from weightcast.sync.transports.collective_roster import Will

_JOINED = "joined"
_CHANGES = "changes"
_GENERATION = "generation"  # the newest, where `Rendezvous.propose` writes it
_LOOKS_A_LOSS = 8


def come_key(generation: int, number: int) -> str:
    """Where the engines of a generation count themselves when they have come for a version."""
    return f"come/{generation}/{number}"


def _will_key(number: int) -> str:
    return f"will/{number}"


def enrol(rendezvous: Rendezvous, will: Will) -> tuple[int, Will]:
    """Become known to the source: the number under which this engine is, and what it has said.

    Of the generations so far it has broken none.
    """
    number = rendezvous.count(_JOINED, 1)
    will = replace(will, after=rendezvous.count(_GENERATION))
    say(rendezvous, number, will)
    return number, will


def say(rendezvous: Rendezvous, number: int, will: Will) -> None:
    """Tell the source what this engine wants from the next version on."""
    rendezvous.put(_will_key(number), will)
    rendezvous.count(_CHANGES, 1)


def leave(rendezvous: Rendezvous, number: int) -> None:
    """Be forgotten."""
    rendezvous.drop(_will_key(number))
    rendezvous.count(_CHANGES, 1)


class Members:
    """The source's view. For one thread."""

    def __init__(self, rendezvous: Rendezvous, lost_after_s: float) -> None:
        self._rendezvous = rendezvous
        self._lost_after_s = lost_after_s
        self._num_changes = 0
        self._wills: dict[str, Will] = {}
        self._beats: dict[str, tuple[int, float]] = {}
        self._looked_s = -1e9
        self._alive: tuple[Will, ...] = ()

    def look(self, now_s: float) -> tuple[Will, ...]:
        """Those that live, as of now or of a moment ago. One request where nothing has changed."""
        num_changes = self._rendezvous.count(_CHANGES)
        if num_changes == self._num_changes and now_s - self._looked_s < self._lost_after_s / _LOOKS_A_LOSS:
            return self._alive
        if num_changes != self._num_changes:
            numbers = range(1, self._rendezvous.count(_JOINED) + 1)
            wills = [self._rendezvous.find(_will_key(number), Will) for number in numbers]
            self._wills = {will.name: will for will in wills if will is not None}
            self._num_changes = num_changes
        self._looked_s = now_s
        beats = self._beats
        self._beats = {}
        for name, count in self._rendezvous.count_beats(self._wills).items():
            before = beats.get(name)
            self._beats[name] = before if before is not None and before[0] == count else (count, now_s)
        limit_s = now_s - self._lost_after_s
        self._alive = tuple(will for name, will in self._wills.items() if self._beats[name][1] >= limit_s)
        return self._alive
