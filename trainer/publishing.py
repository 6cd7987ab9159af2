"""A version of the weights after a step: publishing from inside the training loop.

The version's number is the step. Every rank publishes its own regions. Training goes on when the fleet serves the
version; with `publish.overlap` when the version is packed, or with `publish.hold_next_step` at once, up to the next
optimizer step. A store of versions is written to before training goes on (`store_publishing.py`). For how long it stood
still is in the events. A quantised source (`quantizing.py`) takes its largest weights first.

    with StepPublisher(bridge.weight_source(model), cfg.publish, events) as publisher:
        publisher.after_step(report)
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from weightcast.sync import DeltaMode, Publication, PublishReport, WeightPublisher, WeightSource, kind_of
from weightcast.sync.quantized_source import QuantizedSource
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import PublishConfig, delta_mode, parse_policy
from weightcast.trainer.events import EventLog
from weightcast.trainer.figures import StepReport
from weightcast.trainer.reporting import Reporting
from weightcast.trainer.state import TrainState
from weightcast.trainer.store_publishing import StorePublisher, WrittenVersion


class StepPublisher(Callback):
    """Publishes each `publish.every`-th step. Every rank makes one and calls it alike.

    `prepare` is called before each version; what `config_from` has besides weights goes into a store's whole versions.
    Waits for `publish.wait_for` engines first (rank 0). Raises the errors of `WeightPublisher` or `DiskPublisher`, and
    `DeadlineExceeded` when the engines do not come.
    """

    def __init__(
        self,
        source: WeightSource,
        publish: PublishConfig,
        events: EventLog,
        prepare: Callable[[], None] | None = None,
        config_from: Path | None = None,
    ) -> None:
        assert publish.to is not None
        self._config = publish
        self._events = events
        self._is_first_rank = source.rank == 0
        self._quantized = source if isinstance(source, QuantizedSource) else None
        self._prepare = prepare
        self._pending: tuple[StepReport, Publication | WrittenVersion, float] | None = None
        with ExitStack() as stack:
            # Reports are alike on all ranks, so one rank tells of them.
            self._reporting = stack.enter_context(Reporting(publish)) if self._is_first_rank else None
            self._publisher = _make_publisher(source, publish, config_from)
            stack.enter_context(self._publisher)
            self._publisher.wait_for_subscribers(publish.wait_for, publish.wait_timeout_s)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if error is None:
                self._finish()

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        """Publish where it is due; a step that left the weights as they were makes no version."""
        if self.is_due(report.step) and report.skipped is None:
            state.gather_parameters()
            self.after_step(report)

    def on_weights_change(self, state: TrainState) -> None:
        """Wait until the version that is being packed is, before its weights change."""
        if self._pending is not None and self._config.hold_next_step:
            step, publication, stall_s = self._pending
            start_s = time.monotonic()
            publication.packed()
            self._pending = step, publication, stall_s + time.monotonic() - start_s

    def is_due(self, step: int) -> bool:
        """Whether this step is published."""
        return step % self._config.every == 0

    def after_step(self, step: StepReport) -> None:
        """Publish the version of `step` and record what became of it. Every rank calls it."""
        start_s = time.monotonic()
        self._finish()
        if self._prepare is not None:
            with self._events.phase("publish.prepare", version=step.step):
                self._prepare()
        if self._quantized is not None:
            with self._events.phase("publish.quantize", version=step.step):
                self._quantized.prepare()
        publication = self._publisher.begin(
            version=step.step, timeout_s=self._config.timeout_s, hold=self._config.hold_next_step
        )
        if self._config.overlap:
            self._pending = step, publication, time.monotonic() - start_s
        else:
            publication.wait()
            self._tell(step, publication, time.monotonic() - start_s)

    def _finish(self) -> None:
        """Wait for the version that was begun last, and record what became of it."""
        if self._pending is not None:
            (step, publication, stall_s), self._pending = self._pending, None
            publication.wait()
            self._tell(step, publication, stall_s)

    def _tell(self, step: StepReport, publication: Publication | WrittenVersion, stall_s: float) -> None:
        """Record this rank's packing, and on the first rank the fleet's staging and commit, alike on all ranks."""
        report = publication.wait()
        fleets = [span for span in report.spans if span.phase != "pack" and self._is_first_rank]
        for span in (publication.packed(), *fleets):
            self._events.phase_ran(f"publish.{span.phase}", version=step.step, start_s=span.start_s, end_s=span.end_s)
        self._record(step, report, stall_s)

    def _record(self, step: StepReport, report: PublishReport, stall_s: float) -> None:
        engines = report.engines
        self._events.record(
            "version",
            version=step.step,
            epoch=report.version.epoch,
            step=step.step,
            loss=step.loss,
            grad_norm=step.grad_norm,
            num_bytes=report.num_bytes,
            num_tensors=report.num_tensors,
            stage_s=report.phases_s.get("stage", 0.0),
            pause_ms=max((engine.pause_s for engine in engines), default=0.0) * 1000,
            checksums_checked=sum(engine.checksums_checked for engine in engines),
            stall_s=stall_s,
            engines=[asdict(engine) for engine in engines],
        )
        if self._reporting is not None:
            self._reporting.take(report, stall_s)


def _make_publisher(
    source: WeightSource, publish: PublishConfig, config_from: Path | None
) -> WeightPublisher | StorePublisher:
    """By where `publish.to` is."""
    assert publish.to is not None
    if kind_of(publish.to) == "store":
        return StorePublisher(source, publish, config_from=config_from)
    return WeightPublisher(
        source,
        publish.to,
        timeout_s=publish.timeout_s,
        delta=cast(DeltaMode, delta_mode(publish)),
        policy=None if publish.policy is None else parse_policy(publish.policy),
        expose=publish.expose,
        in_place=publish.in_place,
    )
