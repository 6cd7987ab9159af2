"""Which way bytes take, and whether as deltas: tables of what is chosen and why, and what must hold for all figures."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcast.sync.errors import ReachError
from weightcast.sync.transports.choose import (
    HYSTERESIS,
    KINDS,
    Choice,
    Context,
    Link,
    Offers,
    blend_rate,
    choose_reach,
    refusal,
)
from weightcast.sync.transports.choose_delta import DeltaChoice

ALL = Offers(tickets=frozenset(KINDS))
NEAR = Context(same_host=True, same_uid=True, same_gpu=True)
HOST = dataclasses.replace(NEAR, same_gpu=False)
FAR = Context(same_host=False)
GB = 1e9
NO_TCP = Offers(tickets=frozenset(KINDS) - {"tcp"})


@pytest.mark.parametrize(
    ("offers", "context", "line"),
    [
        (ALL, NEAR, "cuda_ipc: same GPU; not tried yet"),
        (Offers({"shared_memory"}), NEAR, "shared_memory: same host and user; not tried yet"),
        (ALL, HOST, "cuda_ipc: another GPU of the same host; not tried yet"),
        (
            ALL,
            dataclasses.replace(HOST, rates={"cuda_ipc": 6 * GB}),
            "shared_memory: same host and user; not tried yet",
        ),
        (
            ALL,
            dataclasses.replace(HOST, rates={"cuda_ipc": 6 * GB, "shared_memory": 9 * GB}, current="cuda_ipc"),
            "shared_memory: 1.50 times as fast as cuda_ipc: 9 GB/s measured",
        ),
        (
            ALL,
            dataclasses.replace(HOST, same_uid=False, failed={"cuda_ipc": "no peer access", "tcp": "refused"}),
            "zmq: same host, no memory of the source to read; not tried yet",
        ),
        (Offers(), NEAR, "zmq: same host, no memory of the source to read; not tried yet"),
        (Offers(), FAR, "zmq: another host; not tried yet"),
        (ALL, FAR, "tcp: another host; not tried yet"),
        (ALL, dataclasses.replace(FAR, rates={"tcp": 5 * GB}), "zmq: another host; not tried yet"),
        (ALL, dataclasses.replace(FAR, rates={"tcp": 5 * GB}, num_engines=1), "zmq: another host; not tried yet"),
        (
            ALL,
            dataclasses.replace(FAR, rates={"tcp": 5 * GB}, num_engines=8),
            "collective: another host, 8 engines; not tried yet",
        ),
        (
            Offers({"collective"}),
            dataclasses.replace(FAR, num_engines=2),
            "collective: another host, 2 engines; not tried yet",
        ),
        (
            Offers({"collective", "tcp"}),
            dataclasses.replace(
                FAR, rates={"tcp": 1 * GB, "collective": 4 * GB, "zmq": 1 * GB}, current="collective", num_engines=8
            ),
            "collective: another host, 8 engines; 4 GB/s measured, against tcp 1, zmq 1",
        ),
        (
            Offers({"collective", "tcp"}),
            dataclasses.replace(
                FAR, rates={"tcp": 3 * GB, "collective": 2 * GB, "zmq": 1 * GB}, current="collective", num_engines=8
            ),
            "tcp: 1.50 times as fast as collective: 3 GB/s measured",
        ),
        (
            Offers({"collective", "tcp"}),
            dataclasses.replace(FAR, rates={"tcp": 1 * GB, "collective": 4 * GB, "zmq": 1 * GB}, current="collective"),
            "tcp: another host; 1 GB/s measured, against zmq 1",
        ),
        (Offers({"collective"}), dataclasses.replace(HOST, wanted="collective"), "collective: as asked for"),
        (
            Offers({"tcp"}),
            dataclasses.replace(FAR, rates={"tcp": 5 * GB, "zmq": 3 * GB}, current="zmq"),
            "tcp: 1.67 times as fast as zmq: 5 GB/s measured",
        ),
        (
            Offers({"tcp", "shared_memory"}, frozenset({"tcp", "zmq"})),
            HOST,
            "tcp: same host, no memory of the source to read; not tried yet",
        ),
        (NO_TCP, FAR, "zmq: another host; not tried yet"),
        (NO_TCP, dataclasses.replace(FAR, link="rdma"), "mooncake: another host, RDMA link; not tried yet"),
        (NO_TCP, dataclasses.replace(FAR, rates={"zmq": 4.2 * GB}), "mooncake: another host; not tried yet"),
        (
            NO_TCP,
            dataclasses.replace(FAR, rates={"zmq": 4.2 * GB, "mooncake": 1.9 * GB}, current="mooncake"),
            "zmq: 2.21 times as fast as mooncake: 4.2 GB/s measured",
        ),
        (
            NO_TCP,
            dataclasses.replace(FAR, rates={"zmq": 4.2 * GB, "mooncake": 1.9 * GB}, current="zmq"),
            "zmq: another host; 4.2 GB/s measured, against mooncake 1.9",
        ),
        (
            NO_TCP,
            dataclasses.replace(FAR, rates={"zmq": 4 * GB, "mooncake": 4.6 * GB}, current="zmq"),
            "zmq: kept at 4 GB/s; mooncake is 1.15 times as fast, 1.2 would be reason",
        ),
        (
            Offers({"mooncake"}, frozenset({"zmq"})),
            dataclasses.replace(FAR, link="rdma"),
            "zmq: another host, RDMA link; not tried yet",
        ),
        (ALL, dataclasses.replace(NEAR, wanted="zmq"), "zmq: as asked for"),
        (ALL, dataclasses.replace(FAR, wanted="mooncake"), "mooncake: as asked for"),
    ],
)
def test_what_is_chosen_and_why(offers: Offers, context: Context, line: str) -> None:
    assert str(choose_reach(offers, context)) == line


@pytest.mark.parametrize(
    ("offers", "context", "why"),
    [
        (ALL, dataclasses.replace(FAR, wanted="shared_memory"), "the source is on another host"),
        (ALL, dataclasses.replace(FAR, wanted="cuda_ipc"), "the source is on another host"),
        (ALL, dataclasses.replace(HOST, same_uid=False, wanted="shared_memory"), "the source belongs to another user"),
        (Offers(), dataclasses.replace(FAR, wanted="mooncake"), "the source does not expose it"),
        (Offers(), dataclasses.replace(FAR, wanted="collective"), "the source does not expose it"),
        (ALL, dataclasses.replace(FAR, wanted="collective", failed={"collective": "no torch"}), "no torch"),
        (
            Offers({"mooncake"}, frozenset()),
            dataclasses.replace(FAR, wanted="mooncake"),
            "this process cannot use it",
        ),
        (ALL, dataclasses.replace(FAR, wanted="mooncake", failed={"mooncake": "port closed"}), "port closed"),
        (ALL, dataclasses.replace(FAR, wanted="nccl"), "there is no such kind"),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_refused(offers: Offers, context: Context, why: str) -> None:
    with pytest.raises(ReachError) as raised:
        choose_reach(offers, context)
    assert str(raised.value).startswith(f"transport={context.wanted!r} cannot be had: {why}")


subsets = st.frozensets(st.sampled_from(KINDS))
speeds = st.floats(1e6, 1e12)
links: list[Link] = ["unknown", "ethernet", "rdma"]
contexts = st.builds(
    Context,
    same_host=st.booleans(),
    same_uid=st.booleans(),
    same_gpu=st.booleans(),
    link=st.sampled_from(links),
    rates=st.dictionaries(st.sampled_from(KINDS), speeds),
    current=st.none() | st.sampled_from(KINDS),
    failed=st.dictionaries(st.sampled_from(KINDS), st.just("tried")),
)
offered = st.builds(Offers, subsets, subsets)


@given(offered, contexts)
def test_only_what_can_be_used_is_chosen_and_in_one_line(offers: Offers, context: Context) -> None:
    choice = choose_reach(offers, context)
    assert refusal(choice.kind, offers, context) == ""
    assert str(choice).isprintable() and len(str(choice)) < 150


@given(offered, contexts)
def test_a_choice_is_final_until_something_is_measured(offers: Offers, context: Context) -> None:
    first = choose_reach(offers, context)
    again = choose_reach(offers, dataclasses.replace(context, current=first.kind))
    assert again.kind == first.kind


@given(offered, contexts, st.floats(1.0, 100.0))
def test_a_kind_that_is_chosen_is_chosen_when_it_is_faster(offers: Offers, context: Context, factor: float) -> None:
    kind = choose_reach(offers, context).kind
    if kind in context.rates:
        faster = {**context.rates, kind: context.rates[kind] * factor}
        assert choose_reach(offers, dataclasses.replace(context, rates=faster)).kind == kind


@given(offered, contexts)
def test_a_kind_in_use_is_left_only_for_a_fifth(offers: Offers, context: Context) -> None:
    choice = choose_reach(offers, context)
    rates, current = context.rates, context.current
    if "not tried" in choice.reason or current is None or current not in rates or choice.kind == current:
        return
    if refusal(current, offers, context) == "":  # type: ignore[arg-type]
        assert rates[choice.kind] >= HYSTERESIS * rates[current]


@given(offered, contexts, st.dictionaries(st.sampled_from(KINDS), speeds, min_size=len(KINDS)))
def test_after_as_many_transfers_as_there_are_kinds_the_choice_rests(
    offers: Offers, context: Context, true_rates: dict[str, float]
) -> None:
    context = dataclasses.replace(context, rates={}, current=None)
    kinds = []
    for _ in range(2 * len(KINDS)):
        choice = choose_reach(offers, context)
        kinds.append(choice.kind)
        known = {**context.rates, choice.kind: true_rates[choice.kind]}
        context = dataclasses.replace(context, rates=known, current=choice.kind)
    assert len(set(kinds[len(KINDS) :])) == 1
    best = max(true_rates[kind] for kind in context.rates)
    assert true_rates[kinds[-1]] * HYSTERESIS >= best


def test_a_rate_is_a_moving_average_of_large_transfers() -> None:
    assert blend_rate(None, 100, 1.0) is None and blend_rate(5.0, 1 << 30, 0.0) == 5.0
    assert blend_rate(None, 1 << 30, 2.0) == 1 << 29
    rate: float | None = 1e9
    for _ in range(30):
        rate = blend_rate(rate, 2 << 30, 1.0)
    assert rate == pytest.approx(2 << 30, rel=1e-3)


def test_choices_print_as_one_line() -> None:
    assert str(Choice("zmq", "why")) == "zmq: why" and str(DeltaChoice("dense", "why")) == "dense: why"
