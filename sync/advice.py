"""Whether the next version is compared with this one: what rank 0 advises sources that choose by themselves. Pure.

A delta pays where finding it, sending it and applying it together are quicker than sending everything. What that takes
is measured: a link's rate while whole models crossed it, the sources' rate while they compared, the share that changed.
"""

from collections.abc import Sequence

from weightcast.sync.records import EngineReport, SourceReport

# Until a source has compared once: one core of a server with the compiled kernel; and a step of RL at a usual rate.
USUAL_ENCODE_BYTES_PER_S = 5e9
USUAL_RATIO = 0.05
# Deltas must be this much quicker to be begun with, so that the choice does not waver.
MARGIN = 0.8
MAX_RATIO = 0.5
# zstandard halves a delta's bytes and takes ten times as long as the plain codec: it pays below some 1 Gb/s.
PACK_BELOW_BYTES_PER_S = 125e6


class DeltaAdvisor:
    """See the module."""

    def __init__(self) -> None:
        self._link_bytes_per_s: float | None = None
        self._encode_bytes_per_s = USUAL_ENCODE_BYTES_PER_S
        self._ratio = USUAL_RATIO

    def advise(self, sources: Sequence[SourceReport], engines: Sequence[EngineReport]) -> tuple[str, str]:
        """(mode for the next version, why in one line), given what became of this one."""
        self._measure(sources, engines)
        link = self._link_bytes_per_s
        if link is None:
            return "off", "no engine has received a whole model over a network yet"
        dense_s = 1 / link
        delta_s = max(1 / self._encode_bytes_per_s, self._ratio / link)
        facts = (
            f"the slowest link carries {link / 1e9:.2f} GB/s, sources compare at "
            f"{self._encode_bytes_per_s / 1e9:.1f} GB/s, a delta has {self._ratio:.1%} of the bytes"
        )
        if self._ratio >= MAX_RATIO or delta_s >= MARGIN * dense_s:
            return "off", f"whole chunks are as quick: {facts}"
        if link < PACK_BELOW_BYTES_PER_S:
            return "zstd", f"packed deltas are quicker: {facts}"
        return "on", f"deltas are quicker: {facts}"

    def _measure(self, sources: Sequence[SourceReport], engines: Sequence[EngineReport]) -> None:
        dense_bytes = sum(source.dense_bytes for source in sources)
        if not dense_bytes:
            return
        links = [
            engine.num_bytes / engine.stage_s
            for engine in engines
            if engine.transport == "zmq" and engine.num_bytes >= MAX_RATIO * dense_bytes and engine.stage_s > 0
        ]
        if links:
            self._link_bytes_per_s = min(links)
        compared = [source for source in sources if source.changed_elements is not None]
        if compared:
            self._ratio = sum(source.delta_bytes for source in compared) / max(
                1, sum(source.dense_bytes for source in compared)
            )
            # Sources compare at the same time: the slowest one is waited for.
            share = max(source.pack_s for source in compared)
            self._encode_bytes_per_s = dense_bytes / share if share > 0 else self._encode_bytes_per_s
