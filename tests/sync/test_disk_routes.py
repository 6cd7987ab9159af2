"""Which versions are anchors, how an engine gets to a newer one, and that pruning leaves the kept ones in reach."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.sync import Version
from weightcast.sync.disk.records import Base
from weightcast.sync.disk.routes import Chain, Held, Step, VersionInfo, find_needed, find_route, needs_anchor, route_to

EPOCH = 1764150000000


def seal_of(version: Version) -> bytes:
    return f"{version.epoch % 100}/{version.number}".encode()


def info(
    number: int, kind: str, base: int | None = None, dense: int = 1000, delta: int = 10, epoch: int = EPOCH
) -> VersionInfo:
    """`kind`: "a" for an anchor, "d" for a delta, "ad" for both."""
    version = Version(epoch, number)
    upon = Version(epoch, number - 1 if base is None else base)
    return VersionInfo(
        version,
        seal_of(version),
        "a" in kind,
        Base(upon, seal_of(upon)) if "d" in kind else None,
        dense if "a" in kind else 0,
        delta if "d" in kind else 0,
    )


def steps(*names: str, epoch: int = EPOCH) -> tuple[Step, ...]:
    """ "a3" enters version 3 by its anchor, "d4" goes on to 4."""
    return tuple(Step(Version(epoch, int(name[1:])), "dense" if name[0] == "a" else "delta") for name in names)


def held(number: int, epoch: int = EPOCH) -> Held:
    return Held(Version(epoch, number), seal_of(Version(epoch, number)))


STORE = [info(1, "a"), info(2, "d"), info(3, "d"), info(4, "ad"), info(5, "d")]
ROUTES: dict[str, tuple[list[VersionInfo], Held | None, int | None, tuple[Step, ...], tuple[Step, ...] | None]] = {
    "nothing there": ([], None, None, (), None),
    "starts from the nearest anchor": (STORE, None, None, (), steps("a4", "d5")),
    "follows by deltas, past an anchor": (STORE, held(3), 3, (), steps("d4", "d5")),
    "replays what it missed": (STORE, held(1), 1, (), steps("d2", "d3", "d4", "d5")),
    "is up to date": (STORE, held(5), 5, (), None),
    "holds what was pruned": (STORE[3:], held(2), 2, (), steps("a4", "d5")),
    "holds another's bits of that version": (STORE, Held(Version(EPOCH, 3), b"other"), 3, (), steps("a4", "d5")),
    "a spoiled delta ends at the one before": (STORE[:3], held(1), 1, steps("d3"), steps("d2")),
    "a spoiled delta is healed by an anchor": (STORE, held(3), 3, steps("d4"), steps("a4", "d5")),
    "a spoiled anchor is passed by deltas": (STORE, held(3), 3, steps("a4"), steps("d4", "d5")),
    "a spoiled anchor at the start": (STORE, None, None, steps("a4"), steps("a1", "d2", "d3", "d4", "d5")),
    "no way": (STORE, None, None, steps("a4", "a1"), None),
    "has it already": (STORE, held(3), 2, steps("d4", "a4", "d5"), ()),
    "only older ones within reach": (STORE, None, 4, steps("d5"), None),
    "long deltas lose to an anchor": (
        [info(1, "a"), info(2, "d", delta=600), info(3, "ad", delta=600)],
        held(1),
        1,
        (),
        steps("a3"),
    ),
    "a later epoch wins": ([*STORE, info(1, "a", epoch=EPOCH + 9)], held(5), 5, (), steps("a1", epoch=EPOCH + 9)),
    "a base that is gone": ([info(1, "a"), info(3, "d", base=2)], None, None, (), steps("a1")),
}


@pytest.mark.parametrize("case", ROUTES)
def test_routes(case: str) -> None:
    infos, has, above, spoiled, expected = ROUTES[case]
    route = find_route(infos, has, None if above is None else Version(EPOCH, above), spoiled)
    assert (None if route is None else route.steps) == expected
    if route is not None:
        assert route.target == (route.steps[-1].version if route.steps else has.version)  # type: ignore[union-attr]
        assert route.is_upon_held == (not route.steps or route.steps[0].kind == "delta")


@pytest.mark.parametrize(
    ("chain", "expected"),
    [(None, True), (Chain(0, 0), False), (Chain(3, 10), False), (Chain(4, 10), True), (Chain(1, 501), True)],
)
def test_when_an_anchor_is_due(chain: Chain | None, expected: bool) -> None:
    assert needs_anchor(chain, 5, 1000) is expected


def test_every_version_is_an_anchor_when_asked_for() -> None:
    assert needs_anchor(Chain(0, 0), 1, 1000)


@st.composite
def stores(draw: st.DrawFn) -> list[VersionInfo]:
    """A store as publishers leave it: each life begins with an anchor; numbers have gaps; deltas of any size."""
    infos: list[VersionInfo] = []
    for life in range(draw(st.integers(1, 3))):
        number, last = 0, None
        for _ in range(draw(st.integers(1, 8))):
            number += draw(st.integers(1, 3))
            kind = "a" if last is None else draw(st.sampled_from(["d", "d", "d", "a", "ad"]))
            infos.append(info(number, kind, base=last, delta=draw(st.integers(0, 900)), epoch=EPOCH + life))
            last = number
    return infos


@PROPERTY
@given(infos=stores(), keep=st.integers(1, 6))
def test_what_is_kept_can_still_be_reached(infos: list[VersionInfo], keep: int) -> None:
    needed = find_needed(infos, keep)
    left = [item for item in infos if item.version in needed]
    assert [item.version for item in left][-keep:] == [item.version for item in infos][-keep:]
    by_version = {item.version: item for item in left}
    for item in infos[-keep:]:
        route = route_to(item.version, by_version)
        assert route is not None and route.steps[0].kind == "dense" and route.target == item.version
    assert find_needed(left, keep) == needed


@PROPERTY
@given(infos=stores(), data=st.data())
def test_routes_are_walks_along_sound_edges(infos: list[VersionInfo], data: st.DataObject) -> None:
    by_version = {item.version: item for item in infos}
    start = data.draw(st.sampled_from([None, *by_version]))
    has = None if start is None else Held(start, seal_of(start))
    every = [Step(version, kind) for version in by_version for kind in ("dense", "delta")]
    spoiled = data.draw(st.sets(st.sampled_from(every), max_size=4))
    route = find_route(infos, has, start, spoiled)
    if route is None:
        return
    assert not set(route.steps) & spoiled
    at = start
    for taken in route.steps:
        item = by_version[taken.version]
        if taken.kind == "dense":
            assert item.is_anchor and taken is route.steps[0]
        else:
            assert item.base is not None and item.base.version == at
        at = taken.version
    assert at == route.target
    assert start is None or route.target > start
