"""One list of phases from event logs and publish reports, which tell of the same things. Pure.

A report holds the spans that engines and sources sent along; their own event logs have many of them as well, under
the processes' own names. A span that is in both is one phase, of the process that logged it, with the report's figures
added. What only the report has goes to the process that its engine's other spans came from, or gets one of its own.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from weightcast.sync.records import SourceReport, Span
from weightcast.sync.report import PublishReport
from weightcast.sync.trace_input import Phase, Recording, Scalar

FLEET = "fleet"
PACK, STAGE = "pack", "stage"

Key: TypeAlias = tuple[str, int | None, float, float]


def plain_name(phase: Phase) -> str:
    """`publish.pack`, as a trainer calls it, and `pack` are one thing."""
    return phase.name.removeprefix("publish.")


def merge_phases(recording: Recording) -> tuple[Phase, ...]:
    """All phases, each once, by start."""
    merger = _Merger(recording.phases)
    for report in recording.reports:
        merger.add(report)
    return tuple(sorted(merger.phases, key=lambda phase: (phase.start_s, -phase.end_s)))


class _Merger:
    def __init__(self, logged: Sequence[Phase]) -> None:
        self.phases = list(logged)
        self._unclaimed: dict[Key, list[int]] = defaultdict(list)
        for index, phase in enumerate(logged):
            self._unclaimed[_key(plain_name(phase), phase.version, phase.start_s, phase.end_s)].append(index)

    def add(self, report: PublishReport) -> None:
        """Add what is new in a report."""
        packs = [span for span in report.spans if span.phase == PACK]
        for number, (span, source) in enumerate(_match_sources(packs, report.sources)):
            rank = number if source is None else source.rank
            self._add_spans(report, f"source-{rank}", [(span, _source_figures(source))])
        whole = [span for span in report.spans if span.phase != PACK]
        self._add_spans(report, FLEET, [(span, {}) for span in whole])
        for line in report.engines:
            figures: dict[str, Scalar] = {
                "num_bytes": line.num_bytes,
                "transport": line.transport,
                "checksums_checked": line.checksums_checked,
                "num_repeats": line.num_repeats,
                "asked_bytes": line.asked_bytes,
            }
            spans = [(span, figures if span.phase == STAGE else {}) for span in line.spans]
            self._add_spans(report, line.engine, spans)

    def _add_spans(
        self, report: PublishReport, process: str, spans: Sequence[tuple[Span, Mapping[str, Scalar]]]
    ) -> None:
        version = report.version
        left = []
        for span, args in spans:
            same = self._unclaimed.get(_key(span.phase, version.number, span.start_s, span.end_s))
            if same:
                index = same.pop(0)
                logged = self.phases[index]
                self.phases[index] = replace(logged, epoch=version.epoch, args={**logged.args, **args})
                # The fleet's spans are logged by rank 0, which is not the fleet.
                process = logged.process if process != FLEET else process
            else:
                left.append((span, args))
        self.phases += (
            Phase(process, span.phase, version.number, version.epoch, span.start_s, span.end_s, args)
            for span, args in left
        )


def _key(name: str, version: int | None, start_s: float, end_s: float) -> Key:
    return name, version, round(start_s, 6), round(end_s, 6)


def _match_sources(packs: Sequence[Span], sources: Sequence[SourceReport]) -> list[tuple[Span, SourceReport | None]]:
    """Each span of packing with its source. Spans do not say whose they are; their lengths do."""
    left = list(sources)
    matched: list[tuple[Span, SourceReport | None]] = []
    for span in packs:
        length_s = span.end_s - span.start_s
        source = min(left, key=lambda source: abs(source.pack_s - length_s), default=None)
        if source is not None:
            left.remove(source)
        matched.append((span, source))
    return matched


def _source_figures(source: SourceReport | None) -> dict[str, Scalar]:
    if source is None:
        return {}
    figures: dict[str, Scalar] = {"dense_bytes": source.dense_bytes, "delta_bytes": source.delta_bytes}
    if source.changed_elements is not None:
        figures["changed_elements"] = source.changed_elements
    return figures
