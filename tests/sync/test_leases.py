"""Leases: whatever happens and however late messages come, what is read is not overwritten before its time."""

from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weightcast.sync import schema
from weightcast.sync.errors import WireError
from weightcast.sync.host.leases import FollowerState, LeaseBook
from weightcast.sync.host.pool import Staged
from weightcast.sync.host.share_messages import (
    KINDS,
    TO_FOLLOWER,
    TO_LEADER,
    Denied,
    GiveBack,
    Granted,
    Join,
    Joined,
    Offered,
    OtherModel,
    Refused,
    Take,
    Withdrawn,
)
from weightcast.sync.version import Version

LEASE_S = 10.0
STAGED = Staged(Version(1, 3), 4)


def anything(version: Version) -> bool:
    """Every version will do."""
    return True


@pytest.mark.parametrize(
    "message",
    [
        *(Join("a" * 32), Take(4, 1), GiveBack(), Joined(4096, None), Joined(1 << 40, STAGED), OtherModel("b" * 32)),
        *(Offered(STAGED), Withdrawn(), Refused(Version(1, 2), "why"), Granted(1, 60.0), Denied(2)),
    ],
)
def test_messages_come_back_as_they_were(message: Any) -> None:
    raw = schema.pack(KINDS[type(message)], message)
    assert schema.unpack(raw, TO_LEADER | TO_FOLLOWER) == message


def test_a_lease_keeps_the_copy_until_it_is_given_back_or_late() -> None:
    book = LeaseBook(LEASE_S)
    assert not book.take(1, 0)
    book.stage(STAGED)
    assert not book.take(1, 2), "of an earlier state"
    assert book.take(1, 4) and book.take(2, 4)
    assert (book.holders, book.next_end_s) == ((1, 2), None), "nobody wants to overwrite it"
    book.want_overwrite(100.0)
    assert book.next_end_s == 110.0
    assert not book.take(3, 4) and book.offered is None
    book.give_back(2)
    assert book.end_late(109.9) == ()
    book.cancel_overwrite()
    assert book.offered == STAGED and book.holders == (1,) and book.take(2, 4)
    book.want_overwrite(105.0)
    assert book.end_late(110.0) == (1,), "whose time began when it was wanted first"
    assert (book.holders, book.next_end_s) == ((2,), 115.0)
    book.give_back(2)
    book.begin_overwrite()
    assert book.staged is None and book.next_end_s is None
    book.begin_overwrite()
    book.stage(Staged(Version(1, 4), 6))
    assert book.take(1, 6)


def test_answers_to_what_was_given_up_are_passed_over() -> None:
    state = FollowerState(STAGED)
    assert state.ask(lambda version: version > Version(1, 3)) is None
    assert state.ask(anything) == Take(4, 1) and state.ask(anything) is None
    assert state.give_up() and not state.give_up()
    assert state.ask(lambda version: version == Version(1, 3)) == Take(4, 2)
    state.hear(Granted(1, LEASE_S))
    assert state.granted is None
    state.hear(Denied(2))
    assert state.granted is None
    state.hear(Withdrawn())
    assert state.ask(anything) is None
    state.hear(Refused(Version(1, 4), "why"))
    assert state.refused == Refused(Version(1, 4), "why")
    state.hear(Offered(STAGED))
    assert state.refused is not None
    state.hear(Offered(Staged(Version(1, 4), 6)))
    assert state.refused is None, "the leader has it after all"
    with pytest.raises(WireError, match="an answer to the request 7, the last was 2"):
        state.hear(Granted(7, LEASE_S))


class Sharing(RuleBasedStateMachine):
    """A leader and three followers, whose messages arrive in order and whenever they like."""

    FOLLOWERS = (1, 2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.number = 0
        self.state = 0  # of the memory: even when it is whole
        self.book = LeaseBook(LEASE_S)
        self.followers: dict[int, FollowerState] = {}
        self.to_leader: dict[int, deque[Any]] = {}
        self.to_follower: dict[int, deque[Any]] = {}
        # When somebody first wanted to overwrite what a follower has a lease on, and what each reads.
        self.wanted_s: dict[int, float] = {}
        self.read: dict[int, Staged] = {}
        for number in self.FOLLOWERS:
            self.join(number)

    def join(self, number: int) -> None:
        self.followers[number] = FollowerState(self.book.offered)
        self.to_leader[number], self.to_follower[number] = deque(), deque()

    def tell_all(self, message: Any) -> None:
        for queue in self.to_follower.values():
            queue.append(message)

    @rule(number=st.sampled_from(FOLLOWERS))
    def asks(self, number: int) -> None:
        if number not in self.read and (request := self.followers[number].ask(anything)) is not None:
            self.to_leader[number].append(request)

    @rule(number=st.sampled_from(FOLLOWERS))
    def leader_hears(self, number: int) -> None:
        if not self.to_leader[number]:
            return
        message = self.to_leader[number].popleft()
        if isinstance(message, GiveBack):
            self.book.give_back(number)
        elif self.book.take(number, message.state):
            self.wanted_s.pop(number, None)
            self.to_follower[number].append(Granted(message.request, LEASE_S))
        else:
            self.to_follower[number].append(Denied(message.request))

    @rule(number=st.sampled_from(FOLLOWERS))
    def follower_hears(self, number: int) -> None:
        if self.to_follower[number]:
            follower = self.followers[number]
            follower.hear(self.to_follower[number].popleft())
            if number not in self.read and follower.granted is not None:
                self.read[number] = follower.granted

    @rule(number=st.sampled_from(FOLLOWERS))
    def gives_back_or_up(self, number: int) -> None:
        self.read.pop(number, None)
        if self.followers[number].give_up():
            self.to_leader[number].append(GiveBack())

    @rule(number=st.sampled_from(FOLLOWERS))
    def dies_and_joins(self, number: int) -> None:
        self.read.pop(number, None)
        self.book.give_back(number)
        self.join(number)

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.book.offered is not None)
    @rule()
    def wants_to_overwrite(self) -> None:
        self.book.want_overwrite(self.now_s)
        self.wanted_s |= {number: self.wanted_s.get(number, self.now_s) for number in self.book.holders}
        self.tell_all(Withdrawn())

    @precondition(lambda self: self.book.offered is None and self.book.staged is not None)
    @rule(patient=st.booleans())
    def overwrites_or_not(self, patient: bool) -> None:
        self.book.end_late(self.now_s)
        if not self.book.holders:
            self.book.begin_overwrite()
            self.state += 1
        elif not patient:
            self.book.cancel_overwrite()
            assert self.book.offered is not None
            self.tell_all(Offered(self.book.offered))

    @precondition(lambda self: self.book.staged is None)
    @rule()
    def stages(self) -> None:
        self.state += 1 + (self.state % 2 == 0)  # the first overwriting needs nobody's leave
        self.number += 1
        staged = Staged(Version(1, self.number), self.state + self.state % 2)
        self.state = staged.state
        self.book.stage(staged)
        self.tell_all(Offered(staged))

    @invariant()
    def what_is_read_in_time_is_whole(self) -> None:
        for number, staged in self.read.items():
            if self.now_s < self.wanted_s.get(number, self.now_s) + LEASE_S:
                assert self.state == staged.state, "overwritten under a reader"


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)
