"""Whether deltas are sent, and packed: by rates that were measured, and as they were measured."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcast.sync.errors import ConfigError
from weightcast.sync.transports.choose_delta import RETRY_AFTER, WANTED, DeltaChoice, DeltaRates, Mode, choose_delta

GB = 1e9


def make_rates(
    gbits: float | None, encode: float | None = 11.4, apply: float | None = 16.7, **more: float
) -> DeltaRates:
    """Of a link in Gb/s and a codec in GB/s; the defaults are what one core was measured at."""
    link = None if gbits is None else gbits * GB / 8
    return DeltaRates(
        link=link, encode=None if encode is None else encode * GB, apply=None if apply is None else apply * GB, **more
    )


ZSTD = {"compress": 0.4 * GB, "decompress": 1.2 * GB, "compressed_share": 0.61}
SPARSE, SPARSER = 0.0232, 0.0086


@pytest.mark.parametrize(
    ("rates", "ratio", "options", "line"),
    [
        (make_rates(1), SPARSER, {"has_base": False}, "dense: the receiver has acknowledged no base"),
        (make_rates(1), SPARSER, {"same_host": True}, "dense: same host, where copying is faster than comparing"),
        (make_rates(1), SPARSER, {}, "delta: 91.2 times as fast as dense"),
        (make_rates(10), SPARSER, {}, "delta: 9.12 times as fast as dense"),
        (make_rates(25), SPARSER, {}, "delta: 3.65 times as fast as dense"),
        (make_rates(100), SPARSER, {}, "dense: delta is 0.912 times as fast, 1.25 would be reason"),
        (
            make_rates(100),
            SPARSER,
            {"current": "delta"},
            "delta: 0.912 times as fast as dense, and 1.25 times would be reason to go back",
        ),
        (make_rates(400), SPARSER, {"current": "delta"}, "dense: delta is 0.228 times as fast, 1.25 would be reason"),
        (make_rates(400, encode=500, apply=500), SPARSE, {}, "delta: 10 times as fast as dense"),
        # numpy over 10 Gb/s: measured at 0.8 times dense at 2.3 % changed, one Python thread
        (make_rates(10, encode=1.1, apply=2.5), SPARSE, {}, "dense: delta is 0.88 times as fast, 1.25 would be reason"),
        (make_rates(1, apply=0.1), SPARSE, {}, "dense: delta is 0.8 times as fast, 1.25 would be reason"),
        (make_rates(1), 0.5, {}, "dense: deltas are 50% of dense, 50% and more do not pay"),
        (
            make_rates(1),
            0.8,
            {"num_dense": RETRY_AFTER},
            "delta: 91.2 times as fast as dense; how much changes is to be measured",
        ),
        (
            make_rates(1),
            SPARSE,
            {"chain": 0.51},
            "dense: an anchor: deltas since the last one are 51% of dense, more than 50%",
        ),
        (make_rates(1, None, None), None, {}, "delta: not tried yet; how much changes is to be measured"),
        (make_rates(None), SPARSE, {}, "dense: the link was not measured yet"),
        # zstandard: tried where the link is what takes the time, kept where it pays
        (
            make_rates(0.1),
            SPARSE,
            {"current": "delta"},
            "zdelta: 912 times as fast as dense; zstandard is to be measured",
        ),
        (make_rates(0.1, **ZSTD), SPARSE, {"current": "delta"}, "zdelta: 70.7 times as fast as dense"),
        (make_rates(1, **ZSTD), SPARSE, {"current": "delta"}, "zdelta: 54.9 times as fast as dense"),
        (make_rates(2.5, **ZSTD), SPARSE, {"current": "delta"}, "delta: 36.5 times as fast as dense"),
        (make_rates(400), SPARSE, {"wanted": "on"}, "delta: as asked for"),
        (make_rates(400), SPARSE, {"wanted": "zstd", "same_host": True}, "zdelta: as asked for"),
        (make_rates(1), SPARSE, {"wanted": "off"}, "dense: as asked for"),
        (make_rates(1), SPARSE, {"wanted": "on", "has_base": False}, "dense: the receiver has acknowledged no base"),
    ],
)
def test_when_deltas_are_sent_and_why(rates: DeltaRates, ratio: float, options: dict[str, object], line: str) -> None:
    assert str(choose_delta(rates, ratio, **{"has_base": True, **options})) == line  # type: ignore[arg-type]


def test_figures_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="link is 0"):
        DeltaRates(link=0.0)
    with pytest.raises(ConfigError, match="apply is nan"):
        DeltaRates(apply=float("nan"))
    with pytest.raises(ConfigError, match="delta='yes' is no choice"):
        choose_delta(DeltaRates(), None, has_base=True, wanted="yes")


modes: list[Mode] = ["dense", "delta", "zdelta"]
speed = st.floats(1e5, 1e12)
known_rates = st.builds(
    DeltaRates,
    link=speed,
    encode=speed,
    apply=speed,
    compress=speed,
    decompress=speed,
    compressed_share=st.floats(0.05, 0.99),
)
ratios = st.floats(0.0, 0.99)


def choose(rates: DeltaRates, ratio: float, current: Mode) -> DeltaChoice:
    return choose_delta(rates, ratio, has_base=True, current=current)


@given(known_rates, ratios, st.sampled_from(modes), st.floats(1.0, 1e4))
def test_what_pays_on_a_link_pays_on_a_slower_one(rates: DeltaRates, ratio: float, current: Mode, by: float) -> None:
    assert rates.link is not None
    mode = choose(rates, ratio, current).mode
    slower = choose(dataclasses.replace(rates, link=rates.link / by), ratio, current).mode
    if mode != "dense":
        assert slower != "dense"
    if mode == "zdelta" and current != "zdelta":
        assert slower == "zdelta"


@given(known_rates, ratios, st.sampled_from(modes), st.floats(1.0, 1e4), st.sampled_from(["encode", "apply"]))
def test_a_faster_codec_never_makes_it_dense(
    rates: DeltaRates, ratio: float, current: Mode, by: float, which: str
) -> None:
    if choose(rates, ratio, current).mode == "delta":
        faster = dataclasses.replace(rates, **{which: getattr(rates, which) * by})
        assert choose(faster, ratio, current).mode != "dense"


@given(known_rates, ratios, st.sampled_from(modes), st.floats(0.0, 1.0))
def test_fewer_changes_never_make_it_dense(rates: DeltaRates, ratio: float, current: Mode, share: float) -> None:
    if choose(rates, ratio, current).mode == "delta":
        assert choose(rates, ratio * share, current).mode != "dense"


@given(known_rates, ratios)
def test_from_dense_the_rule_is_the_measured_one(rates: DeltaRates, ratio: float) -> None:
    """Without zstandard: below half, and faster than dense by a quarter."""
    assert rates.link is not None and rates.encode is not None and rates.apply is not None
    plain = dataclasses.replace(rates, compressed_share=1.0)
    cost = max(1 / rates.encode, ratio / rates.link, 1 / rates.apply)
    pays = ratio < 0.5 and cost < 0.8 / rates.link
    assert choose(plain, ratio, "dense").mode == ("delta" if pays else "dense")


@given(known_rates, ratios, st.sampled_from(modes))
def test_a_mode_is_final_until_something_changes(rates: DeltaRates, ratio: float, current: Mode) -> None:
    first = choose(rates, ratio, current)
    again = choose(rates, ratio, first.mode)
    assert again.mode == first.mode
    assert first.reason.isprintable() and len(first.reason) < 120


@given(
    st.builds(DeltaRates, link=st.none() | speed, encode=st.none() | speed, apply=st.none() | speed),
    st.none() | ratios,
    st.sampled_from(WANTED),
    st.booleans(),
    st.floats(0, 2),
)
def test_without_a_base_all_is_dense(
    rates: DeltaRates, ratio: float | None, wanted: str, same_host: bool, chain: float
) -> None:
    choice = choose_delta(rates, ratio, has_base=False, same_host=same_host, wanted=wanted, chain=chain)
    assert choice.mode == "dense"
