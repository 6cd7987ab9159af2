"""Broadcasts of a publisher's versions, as decided: who is in which group, when one is made anew, what is asked for."""

from collections import deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.packed import CHUNK_BYTES, Packed, answer, make_packed
from tests.sync.parts import PROPERTY, assert_same_bits, random_bits

from weightcast.sync import Limits, Version
from weightcast.sync.arrival import Arrival
from weightcast.sync.arrival_words import describe_arrival, make_staged
from weightcast.sync.broadcast_offer import BroadcastOffer
from weightcast.sync.effects import Effect, Request
from weightcast.sync.errors import WireError
from weightcast.sync.messages import Announce
from weightcast.sync.records import MAX_TICKET_BYTES
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports.collective_plan import (
    GATHER_S,
    Border,
    BroadcastTicket,
    Decision,
    Standing,
    broadcast_limit_s,
    decide,
    has_gathered,
    pack_ticket,
    plan_broadcast,
    read_ticket,
    takes_part,
)
from weightcast.sync.transports.collective_roster import Will

A, B, C = (Will(name, True, False, 0) for name in "abc")
V1, V2 = Version(7, 1), Version(7, 2)
WHOLE = Border()
RUNNING = Standing(generation=3, engines=("a", "b"))
BROKEN = Standing(generation=3, broken=3)


@pytest.mark.parametrize(
    ("standing", "members", "border", "decision"),
    [
        (Standing(), (A, B), WHOLE, Decision(1, ("a", "b"), "")),
        (Standing(), (B, A, C), WHOLE, Decision(1, ("a", "b", "c"), "")),
        (RUNNING, (B, A), WHOLE, Decision(3, ("a", "b"), "")),
        (RUNNING, (A, B, C), WHOLE, Decision(4, ("a", "b", "c"), "")),
        (RUNNING, (A, C), WHOLE, Decision(4, ("a", "c"), "")),
        (RUNNING, (A, replace(B, willing=False)), WHOLE, Decision(why="1 engines are willing, 2 are needed")),
        (RUNNING, (A,), WHOLE, Decision(why="1 engines are willing, 2 are needed")),
        (RUNNING, (replace(A, insists=True),), WHOLE, Decision(4, ("a",), "")),
        (RUNNING, (), WHOLE, Decision(why="0 engines are willing, 2 are needed")),
        (BROKEN, (A, B), WHOLE, Decision(why="0 engines are willing, 2 are needed")),
        (BROKEN, (replace(A, after=3), B, replace(C, after=3)), WHOLE, Decision(4, ("a", "c"), "")),
        (
            BROKEN,
            (replace(A, after=3), replace(B, after=2)),
            WHOLE,
            Decision(why="1 engines are willing, 2 are needed"),
        ),
        (
            replace(BROKEN, broken=2, engines=("a", "b")),
            (A, B),
            WHOLE,
            Decision(why="0 engines are willing, 2 are needed"),
        ),
        (replace(RUNNING, is_busy=True), (A, B), WHOLE, Decision(why="the version before is still being broadcast")),
        (RUNNING, (A, B), Border(is_whole=False), Decision(why="it goes as what changed, or is read where it lies")),
        (RUNNING, (A, B), Border(num_chunks=0), Decision(why="this source serves nothing")),
    ],
)
def test_who_is_in_the_group_of_a_version(
    standing: Standing, members: tuple[Will, ...], border: Border, decision: Decision
) -> None:
    assert decide(standing, members, border) == decision


def test_a_generation_that_broke_is_never_used_again() -> None:
    again = tuple(replace(will, after=3) for will in (A, B))
    assert decide(replace(RUNNING, broken=3), again, WHOLE) == Decision(4, ("a", "b"), "")


TICKET = BroadcastTicket("127.0.0.1", 5700, "gloo", 10.0, 3, 2, "")


@pytest.mark.parametrize(
    ("announced", "generation", "is_willing", "last", "expected"),
    [
        (3, 3, True, V1, True),
        (3, 3, False, None, True),  # the group's members all receive, whatever they want next
        (3, 0, True, None, True),
        (4, 3, True, V1, True),
        (3, 0, False, None, False),
        (4, 3, False, V1, False),
        (0, 3, True, V1, False),
        (2, 3, True, V1, False),  # an announcement of long ago
        (3, 3, True, V2, False),  # said once more
        (3, 3, True, Version(8, 1), False),
    ],
)
def test_who_waits_for_a_broadcast(
    announced: int, generation: int, is_willing: bool, last: Version | None, expected: bool
) -> None:
    ticket = replace(TICKET, generation=announced)
    assert takes_part(ticket, V2, generation, is_willing, last) is expected


@pytest.mark.parametrize(
    ("num_come", "waited_s", "expected"),
    [(0, None, False), (1, 0.0, False), (1, GATHER_S, False), (1, GATHER_S + 0.1, None), (2, GATHER_S + 1, True)],
)
def test_how_long_a_group_waits_for_its_engines(num_come: int, waited_s: float | None, expected: bool | None) -> None:
    assert has_gathered(num_come, 2, waited_s) is expected


def test_a_broadcast_has_an_end() -> None:
    assert broadcast_limit_s(0) == 60
    assert broadcast_limit_s(16_000_000_000) == 380


def test_tickets() -> None:
    for ticket in (TICKET, replace(TICKET, host="fd00::1", why="x" * 300)):
        raw = pack_ticket(ticket)
        assert len(raw) <= MAX_TICKET_BYTES and read_ticket(raw) == ticket
    assert TICKET.address == "tcp://127.0.0.1:5700"
    assert replace(TICKET, host="fd00::1").address == "tcp://[fd00::1]:5700"
    for broken in (b"", b"\x80", pack_ticket(replace(TICKET, lost_after_s=0.0)), pack_ticket(TICKET)[:-1]):
        with pytest.raises(WireError):
            read_ticket(broken)


def test_both_ends_plan_the_same_buckets_also_of_large_chunks() -> None:
    assert len(plan_broadcast([64 << 20, 64 << 20, 5]).buckets) == 3
    assert plan_broadcast([]).buckets == ()
    assert plan_broadcast([4 << 20] * 9).fingerprint == plan_broadcast([4 << 20] * 9).fingerprint


# An engine's side: a version on its way while a broadcast brings some of it, all, or nothing

LIMITS = Limits(credit_chunks=2, chunk_timeout_s=1.0)


def begin(tensors: dict[str, torch.Tensor]) -> tuple[Packed, Snapshot, Arrival, list[Effect]]:
    """A version that its one source broadcasts, sealed."""
    packed = make_packed(tensors)
    snapshot = packed.pack(1)
    staging = packed.stage(snapshot, Shadow())
    arrival = Arrival(Announce(snapshot.version, ()), staging, CHUNK_BYTES, LIMITS, 0.0, {0: "collective"})
    return packed, snapshot, arrival, arrival.begin(0.0)


def broadcast(snapshot: Snapshot, arrival: Arrival, index: int, now_s: float = 0.0) -> list[Effect]:
    """A chunk as a broadcast brings it: whole, unasked, perhaps twice."""
    header, body = answer(snapshot, index)
    header = replace(header, hash=b"")
    return arrival.land(0, header, body, now_s) if arrival.wants(0, header) else []


def fetch(snapshot: Snapshot, arrival: Arrival, effects: list[Effect]) -> int:
    """Answer requests until there are none; how many there were."""
    asked, count = deque(effects), 0
    while asked:
        effect = asked.popleft()
        assert isinstance(effect, Request) and not effect.message.reached
        count += 1
        header, body = answer(snapshot, effect.message.index, effect.message.base)
        if arrival.wants(0, header):
            asked += arrival.land(0, header, body, 0.0)
    return count


def test_what_is_broadcast_is_not_asked_for() -> None:
    tensors = {"w": random_bits(torch.bfloat16, (50, 400), 1)}
    _, snapshot, arrival, effects = begin(tensors)
    assert effects == [] and len(snapshot) > 8
    assert "or to be broadcast by [0]" in describe_arrival(arrival)
    for index in range(len(snapshot)):
        assert broadcast(snapshot, arrival, index) == []
    assert arrival.is_staged and arrival.ask_rest(0, 0.0) == []
    assert_same_bits(dict(arrival.tensors or {}), tensors)
    staged = make_staged(arrival, 0.0)
    assert (staged.transport, staged.num_repeats, staged.num_bytes) == ("collective", 0, arrival.asked_bytes)


def test_what_a_broadcast_leaves_out_is_asked_for_when_it_is_over() -> None:
    tensors = {"w": random_bits(torch.bfloat16, (50, 400), 2)}
    _, snapshot, arrival, _ = begin(tensors)
    for index in range(len(snapshot)):
        if index not in (3, 5):
            assert broadcast(snapshot, arrival, index) == []
    assert fetch(snapshot, arrival, arrival.ask_rest(0, 0.0)) == 2
    assert arrival.is_staged and arrival.ask_rest(0, 0.0) == []
    staged = make_staged(arrival, 0.0)
    assert (staged.transport, staged.num_repeats) == ("collective+zmq", 2)


@pytest.mark.parametrize(("brought", "transport"), [(0, "zmq"), (2, "collective+zmq")])
def test_a_broadcast_that_does_not_come_is_waited_for_so_long(brought: int, transport: str) -> None:
    tensors = {"w": random_bits(torch.bfloat16, (50, 400), 3)}
    _, snapshot, arrival, _ = begin(tensors)
    for index in range(brought):
        broadcast(snapshot, arrival, index, now_s=0.5)
    last_s = 0.5 if brought else 0.0
    assert arrival.repeat_overdue(last_s + LIMITS.chunk_timeout_s) == []
    effects = arrival.repeat_overdue(last_s + LIMITS.chunk_timeout_s + 0.1)
    assert len(effects) == LIMITS.credit_chunks
    assert fetch(snapshot, arrival, effects) == len(snapshot) - brought
    assert arrival.is_staged and arrival.transport == transport
    assert arrival.num_repeats == (len(snapshot) - brought if brought else 0)


operations = st.lists(
    st.tuples(st.sampled_from(["broadcast", "answer", "end", "time"]), st.integers(0, 19)), max_size=60
)


@PROPERTY
@given(operations)
def test_duplicates_losses_and_late_ones_are_harmless(steps: list[tuple[str, int]]) -> None:
    tensors = {"w": random_bits(torch.bfloat16, (100, 400), 4)}
    packed, snapshot, arrival, effects = begin(tensors)
    assert len(snapshot) == 20
    asked: deque[Effect] = deque(effects)
    now_s = 0.0

    def take(effects: list[Effect]) -> None:
        asked.extend(effects)
        # Credit is kept, and none of it is stuck with chunks that came in another way.
        assert all(packed.layouts[0].rank == rank for rank, _ in arrival.asked_s)
        assert len(arrival.asked_s) <= LIMITS.credit_chunks

    for what, index in steps:
        if arrival.is_staged:
            break
        if what == "broadcast":
            take(broadcast(snapshot, arrival, index, now_s))
        elif what == "end":
            take(arrival.ask_rest(0, now_s))
        elif what == "time":
            now_s += 0.6
            take(arrival.repeat_overdue(now_s))
        elif asked:
            request = asked.popleft()
            assert isinstance(request, Request)
            header, body = answer(snapshot, request.message.index, request.message.base)
            if arrival.wants(0, header):
                take(arrival.land(0, header, body, now_s))
    if not arrival.is_staged:
        fetch(snapshot, arrival, [*asked, *arrival.ask_rest(0, now_s)])
    assert arrival.is_staged and not arrival.asked_s
    assert_same_bits(dict(arrival.tensors or {}), tensors)


def test_offers_leave_the_ways_that_are_asked_over() -> None:
    reached = {0: "collective", 1: "tcp", 2: "collective"}
    offer = BroadcastOffer.take(reached, 1.0, 0.0)
    order = {rank: [0, 1] for rank in range(4)}
    assert reached == {1: "tcp"} and [offer.holds(rank) for rank in range(3)] == [True, False, True]
    offer.hear(0, 1.0)
    offer.hear(1, 1.0)
    assert offer.list_late(1.5) == [2] and not offer.has_brought(1)
    assert offer.name_transport(order, reached) == "collective+tcp+zmq"
    assert offer.end(2, 2) and not offer.end(2, 2) and not offer.end(0, 0)
    assert offer.name_transport({0: [0]}, reached) == "collective"
    assert offer.name_transport({2: [0], 0: []}, {}) == "collective+zmq"
