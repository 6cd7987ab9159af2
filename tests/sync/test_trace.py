"""Traces: what a run wrote of itself, read with care and drawn in the form that viewers read."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import WAIT_S, Engine, make_model, publishers, running
from tests.sync.reports import START_S, make_engine, make_report
from tests.sync.trace_format import check_trace

from weightcast.adapters.timeline import EventLog
from weightcast.sync import PublishReport, ReportLog, Span, Version
from weightcast.sync.errors import ConfigError
from weightcast.sync.report_log import dump_report
from weightcast.sync.trace import build_trace, place
from weightcast.sync.trace_input import Phase, Recording, read_recording
from weightcast.sync.trace_merge import merge_phases


def draw(recording: Recording) -> list[dict[str, Any]]:
    """The checked events of a recording's trace, through JSON."""
    text = json.dumps(build_trace(merge_phases(recording), recording.reports), allow_nan=False)
    return check_trace(json.loads(text))


def named(events: Iterable[dict[str, Any]], kind: str) -> dict[tuple[int, int], str]:
    """Names of processes, keyed (pid, 0), or of tracks, keyed (pid, tid)."""
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == kind}


def drawn_phases(events: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """(process, name) of each complete event."""
    events = list(events)
    processes = named(events, "process_name")
    return [(processes[event["pid"], 0], event["name"]) for event in events if event["ph"] == "X"]


def flows(events: Iterable[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    """The (process, track) that each arrow goes through."""
    events = list(events)
    processes, tracks = named(events, "process_name"), named(events, "thread_name")
    found: dict[int, list[tuple[str, str]]] = {}
    for event in events:
        if event["ph"] in "stf":
            place = processes[event["pid"], 0], tracks[event["pid"], event["tid"]]
            found.setdefault(event["id"], []).append(place)
    return list(found.values())


def test_a_report_alone_makes_a_trace() -> None:
    events = draw(Recording((), (make_report(7),)))
    assert list(named(events, "process_name").values()) == ["source-0", "source-1", "fleet", "engine-0", "engine-1"]
    assert drawn_phases(events) == [
        ("source-0", "pack v7"),
        ("source-1", "pack v7"),
        ("fleet", "stage v7"),
        ("fleet", "commit v7"),
        *((engine, f"{phase} v7") for engine in ("engine-0", "engine-1") for phase in ("stage", "load")),
    ]
    # Both engines waited for source 0, which took twice as long as source 1.
    assert flows(events) == [
        [("source-0", "pack"), (engine, "stage"), (engine, "load")] for engine in ("engine-0", "engine-1")
    ]
    counters = {event["name"]: event["args"]["value"] for event in events if event["ph"] == "C"}
    assert counters == {"received bytes": 16_000_000, "changed %": 0.8, "times less than dense": 125}
    first, *_ = (event for event in events if event["ph"] == "X")
    assert (first["ts"], first["dur"]) == (0.0, pytest.approx(200_000, abs=1))
    assert first["args"]["changed_elements"] == 2_400_000


def test_what_logs_and_reports_both_say_is_drawn_once() -> None:
    report = make_report(7)
    ours = make_engine("host-17", spans=(*report.engines[0].spans, Span("warm", START_S + 0.6, START_S + 0.7)))
    report = replace(report, engines=(ours,))
    logged = [
        Phase("trainer-0", "publish.pack", 7, None, START_S, START_S + 0.2),
        Phase("trainer-0", "publish.stage", 7, None, START_S + 0.2, START_S + 0.5),
        Phase("trainer-1", "publish.pack", 7, None, START_S, START_S + 0.1),
        Phase("trainer-0", "optimizer", 7, None, START_S - 1, START_S),
        Phase("engine", "stage", 7, 1000, START_S + 0.2, START_S + 0.45),
        Phase("engine", "load", 7, 1000, START_S + 0.5, START_S + 0.54),
    ]
    events = draw(Recording(tuple(logged), (report,)))
    assert sorted(drawn_phases(events)) == [
        ("engine", "load v7"),
        ("engine", "stage v7"),
        ("engine", "warm v7"),  # the report alone has it, and knows whose it is
        ("fleet", "commit v7"),
        ("trainer-0", "optimizer v7"),
        ("trainer-0", "publish.pack v7"),
        ("trainer-0", "publish.stage v7"),
        ("trainer-1", "publish.pack v7"),
    ]
    assert flows(events) == [[("trainer-0", "publish.pack"), ("engine", "stage"), ("engine", "load")]]
    staged = next(event for event in events if event["name"] == "stage v7")
    assert staged["args"] == {
        "version": 7, "epoch": 1000, "num_bytes": 8_000_000, "transport": "zmq", "checksums_checked": 30,
        "num_repeats": 0,
        "asked_bytes": 0,
    }  # fmt: skip


def test_arrows_without_reports_and_between_the_right_versions() -> None:
    def publish(number: int, epoch: int | None, at_s: float) -> list[Phase]:
        return [
            Phase("trainer-0", "publish.pack", number, None, at_s, at_s + 1),
            Phase("engine", "stage", number, epoch, at_s + 0.5, at_s + 2),
            Phase("engine", "prepare", number, epoch, at_s + 2, at_s + 2.1),
            Phase("engine", "load", number, epoch, at_s + 2.2, at_s + 2.5),
        ]

    # A run that was resumed: version 2 comes again, of a later epoch.
    recording = Recording((*publish(1, 5, 10.0), *publish(2, 5, 20.0), *publish(2, 6, 30.0)), ())
    events = draw(recording)
    assert flows(events) == [[("trainer-0", "publish.pack"), ("engine", "stage"), ("engine", "load")]] * 3
    points = [event["ts"] for event in events if event["ph"] in "stf"]
    assert points == [0, 0.5e6, 2.2e6, 10e6, 10.5e6, 12.2e6, 20e6, 20.5e6, 22.2e6]


def test_an_engine_that_refused_is_a_moment_with_its_reason() -> None:
    refused = Phase("engine", "refused", 7, 1000, START_S, START_S, {"reason": "late", "ratio": math.inf})
    events = draw(Recording((refused, Phase("engine", "stage", None, None, START_S, START_S + 1)), ()))
    (moment,) = (event for event in events if event["ph"] == "i")
    assert moment["name"] == "refused v7"
    assert moment["args"] == {"version": 7, "epoch": 1000, "reason": "late", "ratio": "inf"}
    assert drawn_phases(events) == [("engine", "stage")] and flows(events) == []


def test_counters_leave_out_what_is_not_known() -> None:
    report = make_report(density=None, num_bytes=0, engines=(make_engine("a", num_bytes=0),))
    events = draw(Recording((), (report,)))
    assert [event["name"] for event in events if event["ph"] == "C"] == ["received bytes"]


drawn = st.builds(
    Phase,
    st.sampled_from(["trainer-0", "trainer-1", "engine", "fleet"]),
    st.sampled_from(["pack", "publish.pack", "stage", "load", "serving"]),
    st.none() | st.integers(0, 2),
    st.none() | st.integers(0, 1),
    st.integers(0, 20).map(float),
    st.just(0.0),
)


@given(st.lists(st.tuples(drawn, st.integers(0, 5)), min_size=1, max_size=12), st.booleans())
def test_whatever_overlaps_a_trace_is_well_formed(found: list[tuple[Phase, int]], has_report: bool) -> None:
    phases = tuple(replace(phase, end_s=phase.start_s + length_s) for phase, length_s in found)
    events = draw(Recording(phases, (make_report(),) if has_report else ()))
    shown = sum(event["ph"] in "Xi" for event in events)
    assert shown == len(phases) + (8 if has_report else 0)
    assert sum(event["ph"] == "X" for event in events) == sum(length_s > 0 for _, length_s in found) + 8 * has_report


def test_a_phase_that_runs_twice_at_once_has_two_tracks() -> None:
    phases = [
        Phase("engine", "stage", number, None, start_s, start_s + 2.0) for number, start_s in ((1, 0), (2, 1), (3, 2))
    ]
    assert [placed.tid for placed in place(1, phases)] == [1, 2, 1]
    events = draw(Recording(tuple(phases), ()))
    assert list(named(events, "thread_name").values()) == ["stage", "stage (2)"]


def test_the_logs_of_a_real_run(tmp_path: Path, address: str) -> None:
    tensors = make_model(1)
    log = ReportLog(tmp_path / "reports.jsonl")
    events = EventLog("engine", tmp_path / "engine.jsonl")
    with (
        publishers(tensors, 1, address, timeout_s=WAIT_S) as (publisher,),
        running(Engine("engine-0", publisher.address)),
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2, 3):
            log.append(publisher.publish(number))
    events.note("refused", Version(1, 3), reason="only said")
    recording = read_recording([tmp_path])
    assert [report.version.number for report in recording.reports] == [1, 2, 3]
    found = draw(recording)
    for number in (1, 2, 3):
        stages = {process for process, name in drawn_phases(found) if name == f"stage v{number}"}
        assert stages == {"fleet", "engine-0"}
    assert [flow[0] for flow in flows(found)] == [("source-0", "pack")] * 3
    assert [flow[1] for flow in flows(found)] == [("engine-0", "stage")] * 3
    assert sum(event["name"] == "received bytes" for event in found) == 3


PHASE = '{"process": "engine", "phase": "load", "version": 1, "epoch": 9, "start_s": 1.5, "end_s": 2, "more": "x"}'


def test_lines_of_every_kind_are_read(tmp_path: Path) -> None:
    lines = [PHASE, '{"process": "trainer-0", "event": "step", "loss": 1.5}', dump_report(make_report()), PHASE[:40]]
    (tmp_path / "trainer.jsonl.0").write_text("\n".join(lines))
    (tmp_path / "notes.txt").write_text("not read")
    (tmp_path / "jsonl").mkdir()
    phase = Phase("engine", "load", 1, 9, 1.5, 2.0, {"more": "x"})
    assert read_recording([tmp_path]) == Recording((phase,), (make_report(),), num_figures=1, num_unfinished=1)
    assert read_recording([tmp_path / "trainer.jsonl.0"]) == read_recording([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("\xff", "can't decode byte"),
        ("[1]", "an object with a 'phase', an 'event', or a publish report's 'format' was expected, got list"),
        ('{"loss": 1}', "got dict of length 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"phase": "load"}', "a phase without 'process'; a phase has process, phase, version, epoch, start_s, end_s"),
        (PHASE.replace("1.5", "NaN"), "start_s: a number >= 0 was expected, got nan"),
        (PHASE.replace("1.5", "3.5"), "a phase that ends at 2.0 before it starts at 3.5"),
        (PHASE.replace('"engine"', "17"), "process: text of at most"),
        (PHASE.replace('"version": 1', '"version": -1'), "version: an integer from 0"),
        ('{"format": "weightcast.publish_report/9"}', "read it with the weightcast it is of"),
    ],
    ids=lambda value: value[:30],
)
def test_a_bad_line_is_refused_with_its_number(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(f"{PHASE}\n".encode() + line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError) as raised:
        read_recording([path])
    assert str(raised.value).startswith(f"{path}, line 2: ") and message in str(raised.value)


def test_nothing_to_read_and_nothing_to_draw_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no files with .jsonl in their names"):
        read_recording([tmp_path])
    with pytest.raises(ConfigError, match=r"cannot read .*absent"):
        read_recording([tmp_path / "absent"])
    with pytest.raises(ConfigError, match="no phases and no reports to draw"):
        build_trace(())


def test_two_sources_that_say_nothing_of_themselves_are_two() -> None:
    twice = (Span("pack", START_S, START_S + 1),) * 2
    merged = merge_phases(Recording((), (make_report(spans=twice, sources=(), engines=()),)))
    assert [phase.process for phase in merged] == ["source-0", "source-1"]


def test_reports_without_times_add_nothing() -> None:
    empty: PublishReport = make_report(spans=(), engines=(), num_bytes=0)
    assert merge_phases(Recording((), (empty,))) == ()
