"""What became of a publish into a store: bytes, seconds and density, of all sources and of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightcast.sync.disk.records import Begin, Part, VersionManifest
from weightcast.sync.regions import TensorSpec
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
    """Seconds of `pack` (copy, compare, digest), `write` (files of this rank) and `meet` (waiting for other ranks)."""
    sources: tuple[PartReport, ...]
    removed: tuple[Version, ...]


def make_report(
    begin: Begin,
    place: str,
    specs: Sequence[TensorSpec],
    parts: Sequence[Part],
    manifest: VersionManifest | None,
    was_compared: bool,
    phases_s: Mapping[str, float],
    removed: tuple[Version, ...],
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
    )


def _report_part(part: Part, was_compared: bool) -> PartReport:
    dense_bytes = sum(piece.num_bytes for piece in part.dense)
    delta_bytes = sum(piece.num_bytes for piece in part.delta)
    changed = part.changed_elements if was_compared else None
    return PartReport(part.rank, part.pack_s, part.write_s, dense_bytes, delta_bytes, changed)
