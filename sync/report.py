"""What became of a version: the record that every publish returns, on every rank.

    report = publisher.publish(version=7)
    report.serving        # the engines that serve it
    report.ratio          # dense bytes for each byte that was received: 1 without deltas, 100 with sparse ones
    report.stall_s        # how long training stood still on this rank

It is what metrics (`metrics.py`), the line in the log, the file of reports (`report_log.py`) and traces (`trace.py`)
are made of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weightcast.sync.messages import Published
from weightcast.sync.records import EngineReport, SourceReport, Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What became of a version. The same on every rank, but for `pack` and `hold`, which are the rank's own."""

    version: Version
    num_bytes: int
    """Bytes that all engines received together."""
    num_tensors: int
    num_chunks: int
    phases_s: dict[str, float]
    """Seconds of `pack` (this rank's stall), `stage` (engines fetch) and `commit` (engines load).

    Where engines read the weights themselves this rank also stood still for `hold`, after `pack`, which only digests.
    """
    spans: tuple[Span, ...]
    """When each source packed, and when the fleet staged and committed."""
    dense_bytes: int
    """Bytes of the whole model."""
    density: float | None
    """Share of the elements that changed since the version before, 0 to 1; None when sources did not compare."""
    sources: tuple[SourceReport, ...]
    engines: tuple[EngineReport, ...]
    delta: str = "off"
    """What sources that choose by themselves do for the next version: "off", "on" or "zstd"."""
    why: str = ""
    """Why, in one line."""

    @property
    def serving(self) -> tuple[str, ...]:
        """The engines that serve this version."""
        return tuple(engine.engine for engine in self.engines if engine.state == "serving")

    @property
    def receiving(self) -> tuple[str, ...]:
        """The engines that received and checked it. Observers, which receive nothing, are not among them."""
        return tuple(line.engine for line in self.engines if line.num_bytes > 0 or line.checksums_checked > 0)

    @property
    def ratio(self) -> float | None:
        """What dense transfers of what the receiving engines want would have taken, over what was received.

        None when no engine received anything; infinite when nothing changed and nothing had to be sent.
        """
        if not self.receiving:
            return None
        receiving = set(self.receiving)
        dense_bytes = sum(line.asked_bytes or self.dense_bytes for line in self.engines if line.engine in receiving)
        return dense_bytes / self.num_bytes if self.num_bytes else math.inf

    @property
    def asked_share(self) -> float | None:
        """Bytes of the chunks that receiving engines want over those of as many models; None as for `ratio`."""
        asked = [line.asked_bytes or self.dense_bytes for line in self.engines if line.engine in self.receiving]
        return sum(asked) / (self.dense_bytes * len(asked)) if asked and self.dense_bytes else None

    @property
    def stall_s(self) -> float:
        """Seconds for which this rank's training stood still: until its bits were safe, in a store until all were."""
        return sum(self.phases_s.get(phase, 0.0) for phase in ("pack", "hold", "write", "meet"))

    @property
    def pause_s(self) -> float:
        """The longest time for which an engine answered nobody."""
        return max((engine.pause_s for engine in self.engines), default=0.0)

    @property
    def num_repeats(self) -> int:
        """Chunks that engines asked for again because they were late or damaged."""
        return sum(engine.num_repeats for engine in self.engines)


def make_report(published: Published, specs: Sequence[TensorSpec], pack: Span) -> PublishReport:
    """The report of a rank that packed in `pack`."""
    phases_s = {"pack": pack.end_s - pack.start_s}
    phases_s |= {s.phase: s.end_s - s.start_s for s in published.spans if s.phase != "pack"}
    changed = [source.changed_elements for source in published.sources]
    num_elements = sum(spec.numel for spec in specs)
    known = [number for number in changed if number is not None]
    return PublishReport(
        version=published.version,
        num_bytes=published.num_bytes,
        num_tensors=len(specs),
        num_chunks=sum(source.num_chunks for source in published.sources),
        phases_s=phases_s,
        spans=published.spans,
        dense_bytes=sum(spec.num_bytes for spec in specs),
        density=sum(known) / num_elements if len(known) == len(changed) and num_elements else None,
        sources=published.sources,
        engines=published.engines,
        delta=published.delta,
        why=published.why,
    )
