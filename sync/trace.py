"""A run as a trace for Perfetto (https://ui.perfetto.dev) or chrome://tracing, from what its processes wrote. Pure.

One process of the trace is a source or an engine, one track of it a phase; a phase that runs twice at once gets a
second track. Arrows lead from the packing that an engine waited for to its staging, and from there to its commit.
The fleet is a process of its own, with counters of bytes, density and ratio, one value a version.

    recording = read_recording([Path("out/demo/events")])
    trace = build_trace(merge_phases(recording), recording.reports)
    Path("trace.json").write_text(json.dumps(trace))

The form is the "Trace Event Format" in its JSON object spelling: complete events (X), moments (i), counters (C), flows
(s, t, f) and names (M); times in microseconds since the first event.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from weightcast.sync.errors import ConfigError
from weightcast.sync.report import PublishReport
from weightcast.sync.trace_input import Phase, Scalar
from weightcast.sync.trace_merge import FLEET, PACK, STAGE, plain_name

Event: TypeAlias = dict[str, Any]
# What engines call the part that serves the new version; see the adapters.
COMMITS = ("commit", "load", "reload", "swap")


@dataclass(frozen=True, slots=True)
class Slice:
    """A phase and its place in the trace."""

    phase: Phase
    pid: int
    tid: int


def build_trace(phases: Sequence[Phase], reports: Sequence[PublishReport] = ()) -> dict[str, Any]:
    """The trace as an object for `json.dumps`. Raises `ConfigError` when there is nothing to show."""
    if not phases:
        raise ConfigError(
            "no phases and no reports to draw; give the files that `logger.events`, `publish.report_log` or an "
            "engine's `--events` wrote"
        )
    start_s = min(phase.start_s for phase in phases)
    pids = number_processes(phases, has_fleet=bool(reports))
    by_process: dict[str, list[Phase]] = defaultdict(list)
    for phase in phases:
        by_process[phase.process].append(phase)
    slices = [placed for name, pid in pids.items() for placed in place(pid, by_process[name])]
    events = [
        *_name_processes(pids),
        *_name_tracks(slices),
        *(_draw(placed, start_s) for placed in slices),
        *_draw_flows(slices, start_s),
        *(event for report in reports for event in _draw_counters(report, pids[FLEET], start_s)),
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"start_s": start_s}}


def number_processes(phases: Sequence[Phase], *, has_fleet: bool) -> dict[str, int]:
    """A number from 1 for each process: sources (which pack), the fleet, then all others, by name."""
    packing = {phase.process for phase in phases if plain_name(phase) == PACK} - {FLEET}
    names = {phase.process for phase in phases} | ({FLEET} if has_fleet else set())

    def rank(name: str) -> tuple[int, int, str]:
        # By length first, so that trainer-10 comes after trainer-9.
        return (0 if name in packing else 1 if name == FLEET else 2, len(name), name)

    return {name: pid for pid, name in enumerate(sorted(names, key=rank), 1)}


def place(pid: int, phases: Iterable[Phase]) -> list[Slice]:
    """One process's phases on its tracks: a track a phase, in the order in which they first began, and one more
    wherever a phase would cover another one."""
    by_name: dict[str, list[Phase]] = defaultdict(list)
    for phase in sorted(phases, key=lambda phase: (phase.start_s, -phase.end_s)):
        by_name[phase.name].append(phase)
    placed, tid = [], 0
    for same in by_name.values():
        ends_s: list[float] = []
        for phase in same:
            lane = next((lane for lane, end_s in enumerate(ends_s) if end_s <= phase.start_s), len(ends_s))
            ends_s[lane : lane + 1] = [phase.end_s]
            placed.append(Slice(phase, pid, tid + 1 + lane))
        tid += len(ends_s)
    return placed


def _name_processes(pids: Mapping[str, int]) -> Iterator[Event]:
    for name, pid in pids.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}


def _name_tracks(slices: Iterable[Slice]) -> Iterator[Event]:
    lanes: dict[tuple[int, str], list[int]] = defaultdict(list)
    for placed in slices:
        tids = lanes[placed.pid, placed.phase.name]
        if placed.tid not in tids:
            tids.append(placed.tid)
    for (pid, name), tids in lanes.items():
        for lane, tid in enumerate(sorted(tids), 1):
            shown = name if lane == 1 else f"{name} ({lane})"
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": shown}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _microseconds(at_s: float, start_s: float) -> float:
    return round((at_s - start_s) * 1e6, 3)


def _draw(placed: Slice, start_s: float) -> Event:
    phase = placed.phase
    version = "" if phase.version is None else f" v{phase.version}"
    known = {"version": phase.version, "epoch": phase.epoch}
    args = {name: _finite(value) for name, value in phase.args.items()}
    event: Event = {
        "name": f"{phase.name}{version}",
        "cat": "phase",
        "ts": _microseconds(phase.start_s, start_s),
        "pid": placed.pid,
        "tid": placed.tid,
        "args": {name: value for name, value in known.items() if value is not None} | args,
    }
    if phase.end_s > phase.start_s:
        return event | {"ph": "X", "dur": _microseconds(phase.end_s, phase.start_s)}
    return event | {"ph": "i", "s": "t"}


def _finite(value: Scalar) -> Scalar:
    """Strict JSON has no infinities and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _draw_flows(slices: Sequence[Slice], start_s: float) -> Iterator[Event]:
    by_version: dict[int, list[Slice]] = defaultdict(list)
    for placed in slices:
        if placed.phase.version is not None and placed.phase.end_s > placed.phase.start_s:
            by_version[placed.phase.version].append(placed)
    flow = 0
    for same in by_version.values():
        packs = [placed for placed in same if plain_name(placed.phase) == PACK]
        sources = {placed.pid for placed in packs}
        for staged in same:
            if staged.phase.name != STAGE or staged.pid in sources or staged.phase.process == FLEET:
                continue
            # Of a run that was resumed there are several; the last to finish is the one that the engine waited for.
            before = [pack for pack in packs if _may_feed(pack, staged)]
            if before:
                flow += 1
                pack = max(before, key=lambda pack: pack.phase.end_s)
                yield from _draw_flow(flow, pack, staged, _find_commit(staged, same), start_s)


def _draw_flow(flow: int, pack: Slice, staged: Slice, commit: Slice | None, start_s: float) -> Iterator[Event]:
    # Staging may begin while a source still packs, but an arrow must not point back in time.
    reached_s = max(staged.phase.start_s, pack.phase.start_s)
    yield _flow("s", flow, pack, pack.phase.start_s, start_s)
    yield _flow("t" if commit else "f", flow, staged, reached_s, start_s)
    if commit:
        yield _flow("f", flow, commit, commit.phase.start_s, start_s)


def _may_feed(pack: Slice, staged: Slice) -> bool:
    return _same_epoch(pack, staged) and pack.phase.start_s <= staged.phase.end_s


def _same_epoch(one: Slice, other: Slice) -> bool:
    """Trainers' lines do not say their epoch."""
    return len({one.phase.epoch, other.phase.epoch} - {None}) <= 1


def _find_commit(staged: Slice, slices: Iterable[Slice]) -> Slice | None:
    after = [
        placed
        for placed in slices
        if placed.pid == staged.pid and _same_epoch(placed, staged) and placed.phase.start_s >= staged.phase.end_s
    ]
    named = [placed for placed in after if placed.phase.name in COMMITS]
    return min(named or after, key=lambda placed: placed.phase.start_s, default=None)


def _flow(kind: str, flow: int, at: Slice, at_s: float, start_s: float) -> Event:
    event = {"ph": kind, "id": flow, "name": "version", "cat": "flow", "ts": _microseconds(at_s, start_s)}
    # Without "bp" an arrow's end goes to the next slice to begin, not to the one that it lies in.
    return event | {"pid": at.pid, "tid": at.tid} | ({"bp": "e"} if kind == "f" else {})


def _draw_counters(report: PublishReport, pid: int, start_s: float) -> Iterator[Event]:
    ends_s = [span.end_s for span in report.spans]
    if not ends_s:
        return
    changed = None if report.density is None else report.density * 100
    counters = {"received bytes": report.num_bytes, "changed %": changed, "times less than dense": report.ratio}
    for name, value in counters.items():
        if value is not None and math.isfinite(value):
            at = {"ts": _microseconds(max(ends_s), start_s), "pid": pid, "tid": 0}
            yield {"ph": "C", "name": name, "cat": "publish", **at, "args": {"value": value}}
