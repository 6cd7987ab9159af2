"""Which state of an engine may follow which: a table, and every pair that is not in it."""

import itertools

import pytest

from weightcast.adapters.lifecycle import (
    Event,
    Failed,
    FollowerState,
    Loaded,
    Paused,
    Prepared,
    Refused,
    Resumed,
    advance,
)
from weightcast.sync import Version

OLD, NEW = Version(1, 3), Version(1, 4)

SERVING = FollowerState("serving", serving=OLD)
PREPARED = FollowerState("prepared", serving=OLD, candidate=NEW)
LOADING = FollowerState("loading", serving=OLD, candidate=NEW)
LOADED = FollowerState("loaded", serving=OLD, candidate=NEW)
POISONED = FollowerState("poisoned", last_error="why")
REFUSED = FollowerState("serving", serving=OLD, num_refused=1, last_error="why")

EVENTS: tuple[Event, ...] = (Prepared(NEW), Refused(NEW, "why"), Paused(), Loaded(), Failed("why"), Resumed())

TABLE: list[tuple[FollowerState, Event, FollowerState]] = [
    (SERVING, Prepared(NEW), PREPARED),
    (SERVING, Refused(NEW, "why"), REFUSED),
    (SERVING, Refused(None, "why"), REFUSED),
    (SERVING, Failed("why"), POISONED),
    (PREPARED, Paused(), LOADING),
    (PREPARED, Refused(NEW, "why"), REFUSED),
    (LOADING, Loaded(), LOADED),
    (LOADING, Refused(NEW, "why"), REFUSED),
    (LOADING, Failed("why"), FollowerState("poisoned", candidate=NEW, last_error="why")),
    (LOADED, Failed("why"), FollowerState("poisoned", candidate=NEW, last_error="why")),
    (LOADED, Resumed(), FollowerState("serving", serving=NEW, num_updates=1)),
]


@pytest.mark.parametrize(("state", "event", "expected"), TABLE)
def test_advance_follows_the_table(state: FollowerState, event: Event, expected: FollowerState) -> None:
    assert advance(state, event) == expected


def test_whatever_is_not_in_the_table_cannot_happen() -> None:
    allowed = {(state.phase, type(event)) for state, event, _ in TABLE}
    refused = [
        (state, event)
        for state, event in itertools.product((SERVING, PREPARED, LOADING, LOADED, POISONED), EVENTS)
        if (state.phase, type(event)) not in allowed
    ]
    assert len(refused) == 5 * len(EVENTS) - len(allowed)
    for state, event in refused:
        with pytest.raises(AssertionError, match="cannot follow"):
            advance(state, event)


def test_the_served_version_changes_only_at_resume() -> None:
    state = SERVING
    for event in (Prepared(NEW), Paused(), Loaded()):
        state = advance(state, event)
        assert state.serving == OLD
    assert advance(state, Resumed()).serving == NEW


def test_a_success_clears_the_last_error() -> None:
    state = REFUSED
    for event in (Prepared(NEW), Paused(), Loaded(), Resumed()):
        state = advance(state, event)
    assert (state.last_error, state.num_refused, state.num_updates) == ("", 1, 1)


def test_only_a_poisoned_engine_is_unhealthy() -> None:
    assert [s.healthy for s in (SERVING, PREPARED, LOADING, LOADED, POISONED)] == [True] * 4 + [False]
