"""The report's parts, from records made by hand."""

import re
from pathlib import Path

import pytest

from weightcast.adapters.demo.events import Phase, VersionRow, parse_event
from weightcast.adapters.demo.proof import Answer, Comparison, Proof, Question
from weightcast.adapters.demo.report import Report, format_bytes, render_report, render_table, render_verdict
from weightcast.adapters.demo.timeline_svg import draw_timeline, format_duration, phase_names, stack_rows, tick_step

ROW = VersionRow(
    version=2,
    step=2,
    loss=7.123456,
    num_bytes=7345664,
    stage_s=0.0123,
    pause_ms=1.44,
    checksums_checked=48,
    served=True,
)
OLD = Answer((7, 7), " lo lo", "default")
NEW = Answer((1, 2), "a<b>&\n", "17.6")
FRESH = Answer((1, 2), "a<b>&\n", "default")
GREEDY, SAMPLED = Question("import "), Question("import ", seed=1)


def proof(*comparisons: Comparison) -> Proof:
    return Proof(comparisons, last_version=6)


def phase(process: str, name: str, start_s: float, end_s: float, version: int = 1) -> Phase:
    return Phase(process, name, version, start_s, end_s)


GOOD = proof(Comparison(GREEDY, OLD, NEW, FRESH), Comparison(SAMPLED, OLD, NEW, FRESH))
PHASES = (
    phase("trainer-0", "step", 100.0, 101.0),
    phase("trainer-0", "forward_backward", 100.1, 100.8),
    phase("engine", "stage", 101.0, 101.5),
)


def test_a_proof_holds_when_equal_and_changed() -> None:
    assert GOOD.faults() == ()
    assert 'class="verdict good"' in render_verdict(GOOD)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (proof(Comparison(GREEDY, OLD, NEW, Answer((1, 3), "", "default"))), "different tokens"),
        (proof(Comparison(GREEDY, NEW, NEW, FRESH)), "as they were"),
        # A sample differs whenever the weights do; it is the greedy tokens that must show the training.
        (proof(Comparison(GREEDY, NEW, NEW, FRESH), Comparison(SAMPLED, OLD, NEW, FRESH)), "as they were"),
        (proof(Comparison(GREEDY, OLD, Answer((1, 2), "", "17.5"), FRESH)), "17.5, not 6"),
        (proof(Comparison(GREEDY, OLD, Answer((1, 2), "", "default"), FRESH)), "default, not 6"),
        (proof(Comparison(GREEDY, OLD, Answer((), "", "17.6"), Answer((), "", "default"))), "no tokens"),
        (proof(), "no tokens"),
    ],
)
def test_each_way_a_proof_fails_is_said(broken: Proof, words: str) -> None:
    assert any(words in fault for fault in broken.faults())
    page = render_verdict(broken)
    assert 'class="verdict bad"' in page and words in page


def test_table_shows_every_column() -> None:
    cells = re.findall(r"<td>(.*?)</td>", render_table([ROW]))
    assert cells == ["2", "2", "7.1235", "yes", "7,345,664", "0.012", "1.4", "48"]


def test_page_is_whole_and_needs_nothing_from_outside() -> None:
    page = render_report(Report((ROW,), PHASES, GOOD, {"engine": "transformers <x>", "model": "m"}, {"torch": "2"}))
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"https?://|src=|href=|@import|url\(|<script|<link", page)
    assert "transformers &lt;x&gt;" in page and "<x>" not in page
    assert "a&lt;b&gt;&amp;↵" in page
    assert "prefers-color-scheme: dark" in page
    for heading in ("Versions", "Timeline", "Proof", "Configuration", "Software"):
        assert f"<h2>{heading}</h2>" in page


def test_differing_tokens_are_marked() -> None:
    differing = Comparison(GREEDY, OLD, Answer((1, 5), "", "17.6"), FRESH)
    page = render_report(Report((ROW,), PHASES, proof(differing), {}, {}))
    assert "1 <mark>5</mark>" in page and "DIFFERS" in page


def test_timeline_has_a_lane_a_process_and_a_bar_a_phase() -> None:
    svg = draw_timeline(PHASES)
    assert re.findall(r'class="process"[^>]*>([^<]*)<', svg) == ["trainer-0", "engine"]
    titles = re.findall(r"<title>(.*?)</title>", svg)
    assert len(titles) == len(PHASES)
    assert "trainer-0 · forward_backward · version 1 · 700.0 ms at 0.100 s" in titles
    assert re.findall(r"</svg>(\w+)</li>", svg) == ["step", "forward_backward", "stage"]


def test_bars_lie_where_their_times_say() -> None:
    svg = draw_timeline([phase("a", "x", 0.0, 1.0), phase("a", "y", 3.0, 4.0)])
    bars = [
        (float(x), float(width)) for x, width in re.findall(r'class="p\d+" x="([\d.]+)" [^>]*width="([\d.]+)"', svg)
    ]
    (first, width), (second, second_width) = bars
    assert width == pytest.approx(second_width, abs=0.02)
    assert second - first == pytest.approx(3 * width, abs=0.05)


def test_phases_inside_others_get_rows_of_their_own() -> None:
    outer, inner, later = phase("a", "step", 0, 10), phase("a", "inner", 1, 2), phase("a", "later", 10, 11)
    assert stack_rows([later, inner, outer]) == [[outer, later], [inner]]


def test_phases_are_named_in_the_order_of_their_first_start() -> None:
    assert phase_names([phase("b", "late", 5, 6), phase("a", "early", 1, 2), phase("a", "late", 3, 4)]) == [
        "early",
        "late",
    ]


def test_a_run_without_phases_says_so() -> None:
    assert draw_timeline([]) == "<p>No phases were recorded.</p>"


@pytest.mark.parametrize("span_s", [0.003, 0.9, 1.0, 7.7, 59.0, 4000.0])
def test_the_axis_has_a_readable_number_of_ticks(span_s: float) -> None:
    step_s = tick_step(span_s)
    assert 6 <= span_s / step_s <= 17
    assert float(f"{step_s:e}".split("e")[0]) in (1.0, 2.0, 5.0)


def test_durations_and_sizes_are_readable() -> None:
    assert [format_duration(0.0123), format_duration(4.567)] == ["12.3 ms", "4.57 s"]
    assert [format_bytes(999), format_bytes(7345664), format_bytes(2 * 10**9)] == ["999 B", "7.35 MB", "2 GB"]


def test_the_page_can_be_written_as_utf8(tmp_path: Path) -> None:
    page = render_report(Report((ROW,), PHASES, GOOD, {}, {}))
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    assert 'charset="utf-8"' in page


def test_events_of_both_kinds_are_read() -> None:
    line = '{"process": "engine", "phase": "load", "version": 3, "start_s": 1.5, "end_s": 2.0}'
    assert parse_event(line) == phase("engine", "load", 1.5, 2.0, version=3)
    line = (
        '{"process": "trainer-0", "event": "version", "version": 2, "step": 2, "loss": 7.123456, "num_bytes": 7345664, '
        '"stage_s": 0.0123, "pause_ms": 1.44, "checksums_checked": 48, "engines": [{"state": "serving"}]}'
    )
    assert parse_event(line) == ROW
    assert parse_event(line.replace("trainer-0", "trainer-1")) is None
    unserved = parse_event(line.replace("serving", "fenced"))
    assert isinstance(unserved, VersionRow) and not unserved.served
