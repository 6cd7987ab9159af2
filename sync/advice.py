"""Whether the next version is compared with this one: what rank 0 advises sources that choose by themselves.

What finding, sending and applying a delta takes is measured, version by version: the rate of the slowest link while
whole models crossed it, of the sources while they compared, and how much changed. `choose_delta` has the rule.

    mode, why = advisor.advise(sources, engines)        # "off", "on" or "zstd", and one line
"""

from collections.abc import Sequence

from weightcast.sync.arrival import HOST_TRANSPORT
from weightcast.sync.records import EngineReport, SourceReport
from weightcast.sync.transports.choose import blend_rate
from weightcast.sync.transports.choose_delta import MAX_RATIO, DeltaRates, Mode, choose_delta

_PACK_MODES: dict[Mode, str] = {"dense": "off", "delta": "on", "zdelta": "zstd"}
# Kinds of transport that cross no network.
_SAME_HOST = frozenset({"shared_memory", "cuda_ipc"})


class DeltaAdvisor:
    """See the module."""

    def __init__(self) -> None:
        self._link: float | None = None
        self._encode: float | None = None
        self._ratio: float | None = None
        self._mode: Mode = "dense"
        self._num_dense = 0

    def advise(self, sources: Sequence[SourceReport], engines: Sequence[EngineReport]) -> tuple[str, str]:
        """(mode for the next version, why), given what became of this one."""
        # Observers receive nothing, and workers that share their host's copy nothing over a link.
        receivers = [engine for engine in engines if engine.transport not in ("", HOST_TRANSPORT)]
        self._measure(sources, receivers)
        choice = choose_delta(
            DeltaRates(link=self._link, encode=self._encode),
            self._ratio,
            has_base=any(engine.state in ("serving", "staged") for engine in receivers),
            same_host=bool(receivers) and all(set(engine.transport.split("+")) <= _SAME_HOST for engine in receivers),
            current=self._mode,
            num_dense=self._num_dense,
        )
        self._mode = choice.mode
        return _PACK_MODES[choice.mode], choice.reason

    def _measure(self, sources: Sequence[SourceReport], receivers: Sequence[EngineReport]) -> None:
        dense_bytes = sum(source.dense_bytes for source in sources)
        for engine in _slowest(receivers, dense_bytes):
            self._link = blend_rate(self._link, engine.num_bytes, engine.stage_s)
        compared = [source for source in sources if source.changed_elements is not None]
        self._num_dense = 0 if compared else self._num_dense + 1
        if compared and dense_bytes:
            self._ratio = sum(source.delta_bytes for source in compared) / dense_bytes
            # Sources compare at the same time, and the slowest one is waited for.
            self._encode = blend_rate(self._encode, dense_bytes, max(source.pack_s for source in compared))


def _slowest(receivers: Sequence[EngineReport], dense_bytes: int) -> Sequence[EngineReport]:
    """The receiver, if any, whose link all that it wants of a model crossed most slowly."""
    links = [
        engine
        for engine in receivers
        if engine.num_bytes > MAX_RATIO * (engine.asked_bytes or dense_bytes)
        and engine.stage_s > 0
        and engine.transport not in _SAME_HOST
    ]
    return [min(links, key=lambda engine: engine.num_bytes / engine.stage_s)] if links else []
