"""The timeline of a run as one inline SVG: a lane a process, a bar a phase, a version's number in its bars.

Phases that lie inside another one (forward and backward inside a step) are drawn a row below it. Everything is
computed from the event records alone; colours come from the page's style sheet, so light and dark both work.

    svg = draw_timeline(phases)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from weightcast.adapters.demo.events import Phase

ROW_HEIGHT = 20
LANE_GAP = 16
LABEL_WIDTH = 96
TOP = 26
RIGHT_MARGIN = 18
MIN_WIDTH = 1128
WIDTH_PER_VERSION = 120
MIN_BAR_WIDTH = 1.5
PALETTE_SIZE = 14


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps seconds since 1970 to horizontal pixels."""

    start_s: float
    end_s: float
    width: float

    def x(self, at_s: float) -> float:
        """Pixels from the left edge of the drawing."""
        span_s = max(self.end_s - self.start_s, 1e-9)
        return LABEL_WIDTH + (at_s - self.start_s) / span_s * (self.width - LABEL_WIDTH - RIGHT_MARGIN)


def draw_timeline(phases: Sequence[Phase]) -> str:
    """The SVG element, followed by its legend, as HTML text. A run without phases gives a sentence instead."""
    if not phases:
        return "<p>No phases were recorded.</p>"
    names = phase_names(phases)
    num_versions = len({phase.version for phase in phases})
    scale = Scale(
        start_s=min(phase.start_s for phase in phases),
        end_s=max(phase.end_s for phase in phases),
        width=max(MIN_WIDTH, LABEL_WIDTH + WIDTH_PER_VERSION * num_versions),
    )
    parts: list[str] = []
    top = TOP
    for process in sorted({phase.process for phase in phases}, key=_lane_order):
        rows = stack_rows([phase for phase in phases if phase.process == process])
        parts.append(_draw_lane(process, rows, top, scale, names))
        top += ROW_HEIGHT * len(rows) + LANE_GAP
    axis = _draw_axis(scale, top)
    body = "".join([axis, *parts])
    svg = (
        f'<svg class="timeline" role="img" aria-label="Timeline of the phases of every version" '
        f'width="{scale.width:.0f}" height="{top}" viewBox="0 0 {scale.width:.0f} {top}">{body}</svg>'
    )
    return f'<div class="scroll">{svg}</div>{_draw_legend(names)}'


def phase_names(phases: Iterable[Phase]) -> list[str]:
    """The names of the phases in the order in which they first began; a name's place decides its colour."""
    first: dict[str, float] = {}
    for phase in phases:
        first[phase.name] = min(phase.start_s, first.get(phase.name, phase.start_s))
    return sorted(first, key=lambda name: first[name])


def stack_rows(phases: Sequence[Phase]) -> list[list[Phase]]:
    """Distributes the phases of one process over rows so that none covers another; outer ones come first."""
    rows: list[list[Phase]] = []
    for phase in sorted(phases, key=lambda phase: (phase.start_s, -phase.end_s)):
        for row in rows:
            if row[-1].end_s <= phase.start_s:
                row.append(phase)
                break
        else:
            rows.append([phase])
    return rows


def _lane_order(process: str) -> tuple[bool, str]:
    return (not process.startswith("trainer"), process)


def _draw_lane(process: str, rows: list[list[Phase]], top: int, scale: Scale, names: list[str]) -> str:
    height = ROW_HEIGHT * len(rows)
    lane = (
        f'<rect class="lane" x="{LABEL_WIDTH}" y="{top}" width="{scale.width - LABEL_WIDTH - RIGHT_MARGIN:.0f}" '
        f'height="{height}"/><text class="process" x="{LABEL_WIDTH - 10}" y="{top + height / 2 + 4:.0f}" '
        f'text-anchor="end">{escape(process)}</text>'
    )
    bars = (
        _draw_bar(phase, top + ROW_HEIGHT * number, scale, names) for number, row in enumerate(rows) for phase in row
    )
    return lane + "".join(bars)


def _draw_bar(phase: Phase, top: int, scale: Scale, names: list[str]) -> str:
    left, right = scale.x(phase.start_s), scale.x(phase.end_s)
    width = max(right - left, MIN_BAR_WIDTH)
    colour = names.index(phase.name) % PALETTE_SIZE
    label = f"v{phase.version}"
    number = (
        f'<text class="number" x="{left + width / 2:.1f}" y="{top + 14}" text-anchor="middle">{label}</text>'
        if width > 7 * len(label) + 4
        else ""
    )
    reason = f": {phase.reason}" if phase.reason else ""
    title = (
        f"{phase.process} · {phase.name} · version {phase.version} · {format_duration(phase.duration_s)} "
        f"at {phase.start_s - scale.start_s:.3f} s{reason}"
    )
    return (
        f'<g><title>{escape(title)}</title><rect class="p{colour}" x="{left:.2f}" y="{top + 2}" '
        f'width="{width:.2f}" height="{ROW_HEIGHT - 4}" rx="2"/>{number}</g>'
    )


def _draw_axis(scale: Scale, bottom: int) -> str:
    span_s = scale.end_s - scale.start_s
    step_s = tick_step(span_s)
    digits = max(0, -_exponent(step_s))
    lines = []
    for number in range(int(span_s / step_s) + 1):
        x = scale.x(scale.start_s + number * step_s)
        lines.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom - LANE_GAP + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{number * step_s:.{digits}f} s</text>'
        )
    return "".join(lines)


def tick_step(span_s: float) -> float:
    """The distance between two ticks in seconds: 1, 2 or 5 times a power of ten, for eight to sixteen ticks."""
    rough_s = max(span_s, 1e-6) / 16
    power = 10.0 ** _exponent(rough_s)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough_s * (1 - 1e-9))


def _exponent(value: float) -> int:
    """The power of ten of the first digit: 0.2 -> -1, 7.0 -> 0."""
    return int(f"{value:e}".split("e")[1])


def format_duration(seconds: float) -> str:
    """`12.3 ms` below a second, `4.56 s` from there on."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _draw_legend(names: list[str]) -> str:
    items = (
        f'<li><svg width="14" height="14"><rect class="p{number % PALETTE_SIZE}" width="14" height="14" rx="2"/></svg>'
        f"{escape(name)}</li>"
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
