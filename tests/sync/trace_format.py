"""What a file must be to be a trace: the "Trace Event Format", JSON object spelling, as Chrome and Perfetto read it.

Written from the format's description, and stricter than the viewers, which pass over what they do not understand.
"""

from collections import defaultdict
from typing import Any

NEEDED = {
    "X": {"ph", "name", "cat", "ts", "dur", "pid", "tid", "args"},
    "i": {"ph", "name", "cat", "ts", "pid", "tid", "s", "args"},
    "C": {"ph", "name", "cat", "ts", "pid", "tid", "args"},
    "s": {"ph", "name", "cat", "ts", "pid", "tid", "id"},
    "t": {"ph", "name", "cat", "ts", "pid", "tid", "id"},
    "f": {"ph", "name", "cat", "ts", "pid", "tid", "id", "bp"},
    "M": {"ph", "name", "pid", "tid", "args"},
}
METADATA = {
    "process_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
SLACK_US = 0.002  # times are rounded to nanoseconds


def check_trace(trace: Any) -> list[dict[str, Any]]:
    """Assert that `trace`, as it came out of `json.loads`, is one; its events."""
    assert isinstance(trace, dict) and trace.keys() <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = trace["traceEvents"]
    assert isinstance(events, list) and events
    for event in events:
        _check_event(event)
    _check_names(events)
    _check_nesting(events)
    _check_flows(events)
    return events


def _check_event(event: dict[str, Any]) -> None:
    assert event.keys() == NEEDED[event["ph"]], event
    assert type(event["pid"]) is type(event["tid"]) is int and event["pid"] > 0 <= event["tid"], event
    assert isinstance(event["name"], str) and event["name"], event
    for key in ("ts", "dur"):
        assert key not in event or (type(event[key]) in (int, float) and event[key] >= 0), event
    if event["ph"] == "i":
        assert event["s"] in ("g", "p", "t")
    if event["ph"] == "C":
        assert event["args"] and all(type(value) in (int, float) for value in event["args"].values()), event
    if event["ph"] == "M":
        key, kind = METADATA[event["name"]]
        assert event["args"].keys() == {key} and type(event["args"][key]) is kind, event


def _check_names(events: list[dict[str, Any]]) -> None:
    """Every process and track that is drawn on is named once, and no two processes, or tracks of one, are alike."""
    processes = [(event["pid"], event["args"]["name"]) for event in events if event["name"] == "process_name"]
    assert len({pid for pid, _ in processes}) == len({name for _, name in processes}) == len(processes)
    tracks = [(event["pid"], event["tid"], event["args"]["name"]) for event in events if event["name"] == "thread_name"]
    assert len({track[:2] for track in tracks}) == len({(pid, name) for pid, _, name in tracks}) == len(tracks)
    assert {event["pid"] for event in events} == {pid for pid, _ in processes}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] in "Xi"} == {track[:2] for track in tracks}


def _check_nesting(events: list[dict[str, Any]]) -> None:
    """Complete events of one track lie one after another: viewers draw what overlaps as if it were called by it."""
    ends_us: dict[tuple[int, int], float] = defaultdict(float)
    for event in sorted((event for event in events if event["ph"] == "X"), key=lambda event: float(event["ts"])):
        track = event["pid"], event["tid"]
        assert event["ts"] >= ends_us[track] - SLACK_US, event
        ends_us[track] = event["ts"] + event["dur"]


def _check_flows(events: list[dict[str, Any]]) -> None:
    """An arrow has one start and one end, runs forward in time, and each of its points lies on a complete event."""
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event)
    for points in flows.values():
        assert "".join(point["ph"] for point in points) in ("sf", "stf"), points
        assert len({(point["name"], point["cat"]) for point in points}) == 1
        assert [point["ts"] for point in points] == sorted(point["ts"] for point in points), points
        assert points[-1]["bp"] == "e"
        for point in points:
            assert any(_is_on(point, event) for event in events if event["ph"] == "X"), point


def _is_on(point: dict[str, Any], event: dict[str, Any]) -> bool:
    is_same_track = (event["pid"], event["tid"]) == (point["pid"], point["tid"])
    return is_same_track and event["ts"] - SLACK_US <= point["ts"] <= event["ts"] + event["dur"] + SLACK_US
