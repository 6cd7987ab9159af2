"""Publish reports for tests, built by hand: two sources, two engines, and an observer."""

from dataclasses import replace
from typing import Any

from weightcast.sync import EngineReport, PublishReport, SourceReport, Span, Version

GB = 10**9
START_S = 1_700_000_000.0


def make_engine(name: str, **fields: Any) -> EngineReport:
    """An engine that serves what it staged in 0.25 s."""
    report = EngineReport(
        engine=name,
        state="serving",
        stage_s=0.25,
        pause_s=0.04,
        num_bytes=8_000_000,
        checksums_checked=30,
        spans=(Span("stage", START_S + 0.2, START_S + 0.45), Span("load", START_S + 0.5, START_S + 0.54)),
        reason="",
        transport="zmq",
        num_repeats=0,
    )
    return replace(report, **fields)


def make_report(number: int = 7, **fields: Any) -> PublishReport:
    """Version `number` of a model of 1 GB, published as a delta of 16 MB to two engines."""
    observer = make_engine("router", num_bytes=0, checksums_checked=0, stage_s=0.0, pause_s=0.0, spans=())
    report = PublishReport(
        version=Version(1000, number),
        num_bytes=16_000_000,
        num_tensors=10,
        num_chunks=250,
        phases_s={"pack": 0.2, "stage": 0.3, "commit": 0.05},
        spans=(
            Span("pack", START_S, START_S + 0.2),
            Span("pack", START_S, START_S + 0.1),
            Span("stage", START_S + 0.2, START_S + 0.5),
            Span("commit", START_S + 0.5, START_S + 0.55),
        ),
        dense_bytes=GB,
        density=0.008,
        sources=(
            SourceReport(0, 0.2, 600_000_000, 5_000_000, 2_400_000),
            SourceReport(1, 0.1, 400_000_000, 3_000_000, 1_600_000),
        ),
        engines=(make_engine("engine-0"), make_engine("engine-1"), observer),
    )
    return replace(report, **fields)
