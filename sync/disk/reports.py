"""What became of a publish into a store: bytes, seconds and density, of all sources and of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from weightcast.sync.disk.fleet_records import Outcome
from weightcast.sync.disk.records import Begin, Part, VersionManifest
from weightcast.sync.records import EngineReport, SourceReport, Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.report import PublishReport
from weightcast.sync.version import Version


@dataclass(frozen=True, slots=True)
class PartReport:
    """What one source did for a version."""

    rank: int
    pack_s: float
    write_s: float
    dense_bytes: int
    delta_bytes: int
    changed_elements: int | None


@dataclass(frozen=True, slots=True)
class DiskReport:
    """A version that is written. On ranks other than 0, `sources` has this rank alone and the byte counts are its own.

    `num_bytes` counts the bytes of all files; `dense_bytes` and `delta_bytes` those of the anchor and of the delta;
    `model_bytes` those of the whole model's tensors.
    """

    version: Version
    place: str
    is_anchor: bool
    has_delta: bool
    num_bytes: int
    dense_bytes: int
    delta_bytes: int
    model_bytes: int
    num_tensors: int
    num_files: int
    density: float | None
    """Share of elements that changed since the version before; None where nothing was compared."""
    phases_s: dict[str, float]
    """Seconds of `pack` (copy, compare, digest), `write` (files of this rank) and `meet` (waiting for other ranks).

    With a policy also of `stage` (until it was released) and `commit` (until the fleet served it)."""
    sources: tuple[PartReport, ...]
    removed: tuple[Version, ...]
    spans: tuple[Span, ...] = ()
    """When the version was packed and written, and with a policy staged and committed, in seconds since 1970.

    Packing and writing take turns; their spans are drawn one after the other, in their lengths."""
    engines: tuple[EngineReport, ...] = ()
    """With a policy: what became of it on each engine."""


def make_report(
    begin: Begin,
    place: str,
    specs: Sequence[TensorSpec],
    parts: Sequence[Part],
    manifest: VersionManifest | None,
    was_compared: bool,
    phases_s: Mapping[str, float],
    removed: tuple[Version, ...],
    started_at_s: float,
) -> DiskReport:
    """The report of rank 0, which has the manifest and all parts, or of another rank, which has its own. Pure."""
    sources = tuple(_report_part(part, was_compared) for part in parts)
    files = manifest.files if manifest is not None else parts[0].files
    num_elements = sum(spec.numel for spec in specs)
    density = None
    if was_compared and manifest is not None and num_elements:
        density = sum(part.changed_elements for part in parts) / num_elements
    return DiskReport(
        version=begin.version,
        place=place,
        is_anchor=begin.is_anchor,
        has_delta=manifest.base is not None if manifest is not None else parts[0].has_delta,
        num_bytes=sum(file.num_bytes for file in files),
        dense_bytes=sum(source.dense_bytes for source in sources),
        delta_bytes=sum(source.delta_bytes for source in sources),
        model_bytes=sum(spec.num_bytes for spec in specs),
        num_tensors=len(specs),
        num_files=len(files),
        density=density,
        phases_s=dict(phases_s),
        sources=sources,
        removed=removed,
        spans=_lay_out_spans(phases_s, started_at_s),
    )


def _lay_out_spans(phases_s: Mapping[str, float], started_at_s: float) -> tuple[Span, ...]:
    ends_at_s = list(accumulate(phases_s.values(), initial=started_at_s))
    return tuple(Span(phase, ends_at_s[i], ends_at_s[i + 1]) for i, phase in enumerate(phases_s))


def add_outcome(report: DiskReport, outcome: Outcome) -> DiskReport:
    """The report of a version that the fleet agreed on."""
    phases_s = report.phases_s | {span.phase: span.end_s - span.start_s for span in outcome.spans}
    return replace(report, phases_s=phases_s, spans=report.spans + outcome.spans, engines=outcome.engines)


def as_publish_report(report: DiskReport, delta: str) -> PublishReport:
    """The same in the words of `WeightPublisher`, for its log, metrics and traces. `delta`: off, on or zstd."""
    kind = "an anchor" if report.is_anchor else "a delta"
    return PublishReport(
        version=report.version,
        num_bytes=sum(engine.num_bytes for engine in report.engines),
        num_tensors=report.num_tensors,
        num_chunks=0,
        phases_s=report.phases_s,
        spans=report.spans,
        dense_bytes=report.model_bytes,
        density=report.density,
        sources=tuple(
            SourceReport(s.rank, s.pack_s, s.dense_bytes, s.delta_bytes, s.changed_elements) for s in report.sources
        ),
        engines=report.engines,
        delta=delta,
        why=f"{kind} of {report.num_bytes} bytes in {report.num_files} files at {report.place}"[:1000],
    )


def _report_part(part: Part, was_compared: bool) -> PartReport:
    dense_bytes = sum(piece.num_bytes for piece in part.dense)
    delta_bytes = sum(piece.num_bytes for piece in part.delta)
    changed = part.changed_elements if was_compared else None
    return PartReport(part.rank, part.pack_s, part.write_s, dense_bytes, delta_bytes, changed)
