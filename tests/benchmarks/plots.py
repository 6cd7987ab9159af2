"""The plots of the page, as SVG. matplotlib is in the extra `bench`.

Each file carries the hash of the results that it was drawn from, so that a test sees an old one without drawing.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import Record
from results import Results

OURS, THEIRS, MISSED = "#1f6feb", "#9aa4af", "#d1242f"
WIDTH_INCHES = 8.0


def list_plots(kind: str, results: Results) -> list[tuple[str, str]]:
    """File name and title of each plot that these results give. Pure."""
    return [(f"{kind}_{name}.svg", title) for name, title, select, _ in PLOTS if select(results)]


def draw_plots(kind: str, results: Results, digest: str, folder: Path) -> None:
    """Draw them all. Raises `ImportError` with the extra's name where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'weightcast[bench]'") from None
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    # Text stays text and ids are the same each time, so that a plot changes only when its figures do.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "weightcast", "font.size": 9}):
        for name, title, select, draw in PLOTS:
            if records := select(results):
                figure = Figure(layout="constrained")
                draw(figure, records)
                figure.suptitle(title, fontsize=10)
                metadata = {"Date": None, "Description": describe_origin(digest)}
                figure.savefig(folder / f"{kind}_{name}.svg", format="svg", metadata=metadata)


def describe_origin(digest: str) -> str:
    """What a plot says about the results that it shows."""
    return f"drawn from results with sha256 {digest}"


def hash_results(path: Path) -> str:
    """Of a results file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _measured(results: Results) -> list[Record]:
    return [record for record in results.records if record.ratio is not None]


def _speeds(results: Results) -> list[Record]:
    return [record for record in _measured(results) if record.unit == "GB/s" and "delta" not in record.case]


def _reached(results: Results) -> list[Record]:
    return [record for record in _measured(results) if record.target]


def _sizes(results: Results) -> list[Record]:
    return [record for record in _measured(results) if record.case.startswith("delta_bytes_")]


def _draw_speeds(figure: Any, records: list[Record]) -> None:
    """Two bars a case, the range over the rounds on each."""
    figure.set_size_inches(WIDTH_INCHES, 0.9 + 0.5 * len(records))
    axes = figure.subplots()
    for place, record in enumerate(records):
        both = ((record.value, record.values, OURS, -0.2), (record.baseline_value, record.baseline_values, THEIRS, 0.2))
        for value, values, colour, shift in both:
            assert value is not None
            spread = [[value - min(values)], [max(values) - value]]
            axes.barh(place + shift, value, 0.36, color=colour, xerr=spread, error_kw={"elinewidth": 0.8})
    axes.set_yticks(range(len(records)), [f"{record.case}\n({record.baseline})" for record in records])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s (blue: weightcast; grey: the baseline in brackets; lines: range over the rounds)")


def _draw_reached(figure: Any, records: list[Record]) -> None:
    """How far each figure is from its target: right of 1 it is reached."""
    figure.set_size_inches(WIDTH_INCHES, 0.9 + 0.24 * len(records))
    axes = figure.subplots()
    for place, record in enumerate(records):
        assert record.ratio is not None
        limit = float(record.target.split()[-1])
        margin = record.ratio / limit if record.target.startswith("at least") else limit / max(record.ratio, 1e-9)
        axes.barh(place, margin - 1, left=1, color=OURS if record.reached else MISSED)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(records)), [f"{record.case} ({record.target})" for record in records])
    axes.invert_yaxis()
    axes.set_xlabel("figure over target, or target over figure where less is better")


def _draw_sizes(figure: Any, records: list[Record]) -> None:
    """Dense bytes over delta bytes by the share of changed elements, for each codec."""
    figure.set_size_inches(WIDTH_INCHES, 3.2)
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        assert record.ratio is not None
        share = int(record.case.split("_")[2]) / 10
        ours = "weightcast, zstandard" if record.case.endswith("_z") else "weightcast"
        lines.setdefault(ours, []).append((share, record.ratio))
        if ours == "weightcast":
            lines.setdefault("int32 positions and values", []).append((share, record.details["sparse_int32_ratio"]))
            lines.setdefault("dense XOR, zstandard", []).append((share, record.details["xor_zstd_ratio"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xlabel("% of the elements changed")
    axes.set_ylabel("dense bytes / delta bytes")
    axes.set_yscale("log")
    axes.legend(frameon=False)


Draw = Callable[[Any, list[Record]], None]
PLOTS: tuple[tuple[str, str, Callable[[Results], list[Record]], Draw], ...] = (
    ("speeds", "A model from process to process", _speeds, _draw_speeds),
    ("reached", "What was to be reached", _reached, _draw_reached),
    ("sizes", "Bytes of a delta", _sizes, _draw_sizes),
)
