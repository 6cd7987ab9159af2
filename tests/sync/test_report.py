"""Publish reports: what follows from them, the line in a log, and the file of JSON lines that comes back whole."""

import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import WAIT_S, Engine, make_model, make_specs, publishers, running
from tests.sync.reports import GB, make_engine, make_report

from weightcast.sync import EngineReport, PublishReport, ReportLog, SourceReport, Span, Version
from weightcast.sync.errors import ConfigError, StorageError, WireError
from weightcast.sync.metrics import format_report
from weightcast.sync.report_log import dump_report, parse_report, read_reports

IDLE = make_engine("engine-2", num_bytes=0, checksums_checked=0, state="fenced", reason="late\n\tand  damaged")


@pytest.mark.parametrize(
    ("report", "ratio"),
    [
        (make_report(), 2 * GB / 16_000_000),
        (make_report(engines=(make_engine("a", num_bytes=GB),), num_bytes=GB), 1.0),
        (make_report(engines=(make_engine("a", num_bytes=GB), IDLE), num_bytes=GB), 1.0),
        (make_report(engines=(make_engine("a", num_bytes=0),), num_bytes=0), math.inf),
        (make_report(engines=(IDLE,), num_bytes=0), None),
        (make_report(engines=(), num_bytes=0), None),
    ],
)
def test_ratio_counts_the_engines_that_received(report: PublishReport, ratio: float | None) -> None:
    assert report.ratio == ratio


def test_what_follows_from_a_report() -> None:
    report = make_report(engines=(make_engine("a", num_repeats=2), make_engine("b", pause_s=0.5, num_repeats=1), IDLE))
    assert report.serving == report.receiving == ("a", "b")
    assert (report.stall_s, report.pause_s, report.num_repeats) == (0.2, 0.5, 3)
    assert make_report(engines=(), phases_s={}).pause_s == make_report(phases_s={}).stall_s == 0.0


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (
            make_report(),
            "version 7: 16 MB to 2 engines (zmq), pack 0.200 s, stage 0.300 s, commit 0.050 s; density 0.8 %, "
            "125x less than dense; stall 0.200 s, pause 0.040 s",
        ),
        (
            make_report(
                density=None, num_bytes=GB, engines=(make_engine("a", num_bytes=GB, transport="shared_memory"),)
            ),
            "version 7: 1 GB to 1 engine (shared_memory), pack 0.200 s, stage 0.300 s, commit 0.050 s; "
            "stall 0.200 s, pause 0.040 s",
        ),
        (
            make_report(density=0.0, num_bytes=0, engines=(make_engine("a", num_bytes=0, num_repeats=3), IDLE)),
            "version 7: 0 B to 1 engine (zmq), pack 0.200 s, stage 0.300 s, commit 0.050 s; density 0 %, nothing had "
            "to be sent; stall 0.200 s, pause 0.040 s; 3 chunks asked for again; engine-2 is fenced (late and damaged)",
        ),
        (
            make_report(engines=(), num_bytes=0, phases_s={"pack": 12.345}, density=None),
            "version 7: 0 B to 0 engines, pack 12.35 s; stall 12.35 s, pause 0.000 s",
        ),
    ],
)
def test_a_report_is_one_line_of_log(report: PublishReport, line: str) -> None:
    assert format_report(report) == line


times = st.floats(0, 1e12)
counts = st.integers(0, 2**64 - 1)
words = st.text(max_size=40).filter(lambda word: "\0" not in word)
spans = st.lists(st.builds(Span, words, times, times), max_size=3).map(tuple)
drawn_reports = st.builds(
    PublishReport,
    version=st.builds(Version, counts, counts),
    num_bytes=counts,
    num_tensors=counts,
    num_chunks=counts,
    phases_s=st.dictionaries(words, times, max_size=3),
    spans=spans,
    dense_bytes=counts,
    density=st.none() | st.floats(0, 1),
    sources=st.lists(st.builds(SourceReport, st.integers(0, 1 << 16), times, counts, counts, counts), max_size=3).map(
        tuple
    ),
    engines=st.lists(
        st.builds(EngineReport, words, words, times, times, counts, counts, spans, words, words, counts), max_size=3
    ).map(tuple),
)


@given(drawn_reports)
def test_every_report_comes_back_from_its_line(report: PublishReport) -> None:
    line = dump_report(report)
    assert "\n" not in line
    assert parse_report(json.loads(line)) == report
    assert format_report(report).isprintable()


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reports.jsonl"
    ReportLog(path).append(make_report(1))
    log = ReportLog(path)
    log.append(make_report(2))
    log.append(make_report(3))
    assert list(read_reports(path)) == [make_report(1), make_report(2), make_report(3)]


def test_what_a_real_publisher_reports_comes_back(tmp_path: Path, address: str) -> None:
    tensors = make_model(1)
    log = ReportLog(tmp_path / "reports.jsonl")
    with publishers(tensors, 1, address, timeout_s=WAIT_S) as (publisher,):
        with running(Engine("engine-0", publisher.address)):
            publisher.wait_for_subscribers(1)
            reports = [publisher.publish(number) for number in (1, 2)]
        for report in reports:
            log.append(report)
    assert list(read_reports(log.path)) == reports
    assert reports[0].dense_bytes == sum(spec.num_bytes for spec in make_specs(tensors))
    assert reports[0].receiving == reports[0].serving == ("engine-0",)
    assert reports[0].ratio == pytest.approx(1.0, rel=0.01)  # chunks are aligned, so a little more is sent
    assert reports[0].stall_s == reports[0].phases_s["pack"] > 0


def change(**changes: Any) -> dict[str, Any]:
    """The fields of a good line, with some changed."""
    good: dict[str, Any] = json.loads(dump_report(make_report()))
    return good | changes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "a report of the format 'weightcast.publish_report/1' was expected, got list of length 0"),
        ({"phase": "pack"}, "was expected, got None"),
        (change(format="weightcast.publish_report/2"), "got 'weightcast.publish_report/2'; read it with"),
        (change(more=1), "a PublishReport with the fields"),
        (change(num_bytes=-1), "num_bytes: an integer from 0"),
        (change(num_bytes=True), "num_bytes: an integer from 0"),
        (change(density=1.5), "density: a share from 0 to 1 was expected, got 1.5"),
        (change(density=math.nan), "density: a number >= 0 was expected, got nan"),
        (change(phases_s=[1]), "phases_s: an object of at most"),
        (change(phases_s={"pack": -1.0}), "phases_s: a number >= 0"),
        (change(version={"epoch": 1}), "version: a Version with the fields ['epoch', 'number'] was expected"),
        (change(sources=[{}]), "sources: a SourceReport with the fields"),
        (change(engines=["x"]), "engines: a EngineReport with the fields"),
        (change(spans=[{"phase": "pack", "start_s": "now", "end_s": 1}]), "spans: start_s: a number >= 0"),
    ],
)
def test_lines_that_are_no_reports_are_refused(line: object, message: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_report(line)
    assert message in str(raised.value)


def test_a_bad_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_text(dump_report(make_report()) + "\n{\n")
    reports = read_reports(path)
    assert next(reports) == make_report()
    with pytest.raises(ConfigError, match=r"reports.jsonl, line 2: Expecting property name"):
        next(reports)
    with pytest.raises(ConfigError, match=r"cannot read .*absent"):
        next(read_reports(tmp_path / "absent"))


def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot append a report to .*name a file in a folder with room"):
        ReportLog(tmp_path / "file" / "reports.jsonl")
    if os.path.exists("/dev/full"):
        log = ReportLog(Path("/dev/full"))
        with pytest.raises(StorageError, match="No space left"):
            log.append(make_report())


def test_the_checks_know_every_field() -> None:
    line = json.loads(dump_report(make_report()))
    for cls, found in ((PublishReport, line), (SourceReport, line["sources"][0]), (EngineReport, line["engines"][0])):
        assert {field.name for field in fields(cls)} == found.keys() - {"format"}
    assert parse_report(line) == replace(make_report())
