"""What became of a version: the record that every publish returns, on every rank.

    report = publisher.publish(version=7)
    report.serving        # the engines that serve it
    report.ratio          # dense bytes for each byte that was received: 1 without deltas, 100 with sparse ones
    report.stall_s        # how long training stood still on this rank

It is what metrics (`metrics.py`), the line in the log, the file of reports (`report_log.py`) and traces (`trace.py`)
are made of.
"""

import math
from dataclasses import dataclass

from weightcast.sync.records import EngineReport, SourceReport, Span
from weightcast.sync.version import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What became of a version. The same on every rank, but for the length of `pack`, which is the rank's own."""

    version: Version
    num_bytes: int
    """Bytes that all engines received together."""
    num_tensors: int
    num_chunks: int
    phases_s: dict[str, float]
    """Seconds of `pack` (this rank's stall), `stage` (engines fetch) and `commit` (engines load)."""
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
        return sum(self.phases_s.get(phase, 0.0) for phase in ("pack", "write", "meet"))

    @property
    def pause_s(self) -> float:
        """The longest time for which an engine answered nobody."""
        return max((engine.pause_s for engine in self.engines), default=0.0)

    @property
    def num_repeats(self) -> int:
        """Chunks that engines asked for again because they were late or damaged."""
        return sum(engine.num_repeats for engine in self.engines)
