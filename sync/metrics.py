"""Publish reports as Prometheus metrics, on a registry of our own, and as one line for a log.

    metrics = PublishMetrics()
    with metrics.serve(9464):                        # http://127.0.0.1:9464/metrics; loopback unless told otherwise
        metrics.observe(publisher.publish(version=7))
    logger.info("%s", format_report(report))

Needs `prometheus_client` (the extra `metrics`), which is imported when a `PublishMetrics` is made.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from weightcast.sync.errors import AddressError, ConfigError
from weightcast.sync.fleet import STATES
from weightcast.sync.report import PublishReport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX = "weightcast_sync"
# A pause of an embedded engine is milliseconds, a publish over a slow link minutes.
SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class PublishMetrics:
    """What the publishes of one process came to. Thread-safe, as prometheus_client is.

    | metric | kind | what |
    |---|---|---|
    | `weightcast_sync_publishes_total` | counter | versions observed |
    | `weightcast_sync_seconds{phase}` | histogram | seconds of `pack`, `stage` and `commit` |
    | `weightcast_sync_stall_seconds` | histogram | for how long training stood still on this rank |
    | `weightcast_sync_pause_seconds{engine}` | histogram | for how long an engine answered nobody |
    | `weightcast_sync_stage_seconds{engine}` | histogram | how long an engine took to receive and check a version |
    | `weightcast_sync_bytes_total{transport,kind}` | counter | `received`; and `dense`, what it stands for |
    | `weightcast_sync_source_bytes{rank,kind}` | gauge | a source's part of the last version: `dense` and `delta` |
    | `weightcast_sync_source_pack_seconds{rank}` | gauge | how long a source packed the last version |
    | `weightcast_sync_repeats_total` | counter | chunks that were asked for again |
    | `weightcast_sync_checksums_total` | counter | checksums that engines checked |
    | `weightcast_sync_density` | gauge | share of elements that the last version changed; NaN when not known |
    | `weightcast_sync_delta_ratio` | gauge | dense bytes over received bytes, last version; NaN when nobody received |
    | `weightcast_sync_published_version`, `_published_epoch` | gauge | the last version |
    | `weightcast_sync_model_bytes` | gauge | bytes of the model |
    | `weightcast_sync_engines{state}` | gauge | engines in each state after the last version |

    The series of an engine or source end with the first report that no longer has it.
    """

    def __init__(self, registry: "CollectorRegistry | None" = None) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError(
                "metrics need prometheus_client; install it with `pip install 'weightcast[metrics]'`"
            ) from error
        self.registry = prometheus.CollectorRegistry() if registry is None else registry

        def make(kind: Any, name: str, what: str, *labels: str, **kwargs: Any) -> Any:
            return kind(f"{PREFIX}_{name}", what, labels, registry=self.registry, **kwargs)

        def seconds(name: str, what: str, *labels: str) -> Any:
            return make(prometheus.Histogram, name, what, *labels, buckets=SECONDS_BUCKETS)

        counter, gauge = prometheus.Counter, prometheus.Gauge
        self._publishes = make(counter, "publishes", "Versions published")
        self._seconds = seconds("seconds", "Seconds by phase of a publish", "phase")
        self._stall = seconds("stall_seconds", "Seconds for which training stood still on this rank")
        self._pause = seconds("pause_seconds", "Seconds for which an engine answered nobody", "engine")
        self._stage = seconds("stage_seconds", "Seconds that an engine took to receive and check", "engine")
        self._bytes = make(counter, "bytes", "Bytes received, and dense bytes they stand for", "transport", "kind")
        self._source_bytes = make(gauge, "source_bytes", "A source's part of the last version", "rank", "kind")
        self._source_pack = make(gauge, "source_pack_seconds", "Seconds of packing, last version", "rank")
        self._repeats = make(counter, "repeats", "Chunks that were asked for again")
        self._checksums = make(counter, "checksums", "Checksums that engines checked")
        self._density = make(gauge, "density", "Share of elements that the last version changed")
        self._ratio = make(gauge, "delta_ratio", "Dense bytes over received bytes, last version")
        self._version = make(gauge, "published_version", "Number of the last version")
        self._epoch = make(gauge, "published_epoch", "Epoch of the last version")
        self._model_bytes = make(gauge, "model_bytes", "Bytes of the model")
        self._engines = make(gauge, "engines", "Engines by state after the last version", "state")
        self._engines_seen: set[str] = set()
        self._ranks_seen: set[str] = set()
        self._lock = threading.Lock()

    def observe(self, report: PublishReport) -> None:
        """Count one publish. Call it once a version, on one rank."""
        with self._lock:
            self._observe_version(report)
            self._observe_engines(report)
            self._observe_sources(report)

    def _observe_version(self, report: PublishReport) -> None:
        self._publishes.inc()
        for phase, length_s in report.phases_s.items():
            self._seconds.labels(phase).observe(length_s)
        self._stall.observe(report.stall_s)
        self._density.set(math.nan if report.density is None else report.density)
        self._ratio.set(math.nan if report.ratio is None else report.ratio)
        self._version.set(report.version.number)
        self._epoch.set(report.version.epoch)
        self._model_bytes.set(report.dense_bytes)

    def _observe_engines(self, report: PublishReport) -> None:
        receiving, names = set(report.receiving), {line.engine for line in report.engines}
        for gone in self._engines_seen - names:
            _remove(self._pause, gone)
            _remove(self._stage, gone)
        self._engines_seen = names
        for line in report.engines:
            self._repeats.inc(line.num_repeats)
            self._checksums.inc(line.checksums_checked)
            if line.state == "serving":
                self._pause.labels(line.engine).observe(line.pause_s)
            if line.engine in receiving:
                self._stage.labels(line.engine).observe(line.stage_s)
                self._bytes.labels(line.transport, "received").inc(line.num_bytes)
                self._bytes.labels(line.transport, "dense").inc(line.asked_bytes or report.dense_bytes)
        counts = Counter(line.state for line in report.engines)
        for state in {*STATES, *counts}:
            self._engines.labels(state).set(counts[state])

    def _observe_sources(self, report: PublishReport) -> None:
        ranks = {str(source.rank) for source in report.sources}
        for gone in self._ranks_seen - ranks:
            _remove(self._source_pack, gone)
            _remove(self._source_bytes, gone, "dense")
            _remove(self._source_bytes, gone, "delta")
        self._ranks_seen = ranks
        for source in report.sources:
            self._source_pack.labels(str(source.rank)).set(source.pack_s)
            self._source_bytes.labels(str(source.rank), "dense").set(source.dense_bytes)
            self._source_bytes.labels(str(source.rank), "delta").set(source.delta_bytes)

    def serve(self, port: int, host: str = "127.0.0.1") -> "MetricsServer":
        """Answer Prometheus at `http://host:port/metrics` from a thread, until the server is closed.

        Port 0 picks a free one. Anyone who reaches `host` may read the metrics: beyond loopback, that is your choice.
        Raises `AddressError` when the address cannot be had.
        """
        return MetricsServer(self, port, host)


class MetricsServer:
    """The HTTP exporter; `address` is its host and port. A context manager."""

    def __init__(self, metrics: PublishMetrics, port: int, host: str) -> None:
        from prometheus_client import start_http_server

        try:
            self._server, self._thread = start_http_server(port, host, registry=metrics.registry)
        except (OSError, OverflowError) as error:
            raise AddressError(
                f"cannot answer Prometheus at {host}:{port}: {error}; choose a free port of this machine, or 0"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_port}"

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove(metric: Any, *labels: str) -> None:
    with suppress(KeyError):  # a series that never began; newer releases of prometheus_client pass it over
        metric.remove(*labels)


def format_report(report: PublishReport) -> str:
    """One line for a log: what was sent to whom, how long it took, and who does not serve it and why.

    `version 7: 12.3 MB to 2 engines (zmq), pack 0.20 s, stage 0.31 s, commit 0.04 s; density 0.81 %, 117x less than
    dense; stall 0.20 s, pause 0.035 s`
    """
    receivers = [line for line in report.engines if line.engine in report.receiving]
    over = f" ({', '.join(sorted({line.transport for line in receivers}))})" if receivers else ""
    plural = "" if len(receivers) == 1 else "s"
    phases = ", ".join(f"{phase} {_seconds(length_s)}" for phase, length_s in report.phases_s.items())
    sent = f"version {report.version.number}: {_bytes(report.num_bytes)} to {len(receivers)} engine{plural}{over}"
    waits = f"stall {_seconds(report.stall_s)}, pause {_seconds(report.pause_s)}"
    parts = [f"{sent}, {phases}" if phases else sent, *_sparseness(report), waits]
    if report.num_repeats:
        parts.append(f"{report.num_repeats} chunks asked for again")
    # Names and reasons are the engines' own texts: on one line, and no terminal's commands, whatever is in them.
    line = "; ".join([*parts, *_not_serving(report)])
    return " ".join("".join(letter if letter.isprintable() else " " for letter in line).split())


def _sparseness(report: PublishReport) -> Iterable[str]:
    said = [] if report.density is None else [f"density {report.density * 100:.3g} %"]
    if report.asked_share is not None and report.asked_share < 1:
        said.append(f"engines want {report.asked_share * 100:.3g} % of the model")
    ratio = report.ratio
    if ratio == math.inf:
        said.append("nothing had to be sent")
    elif ratio is not None and (report.density is not None or ratio > 1.1):
        said.append(f"{ratio:.3g}x less than dense")
    return [", ".join(said)] if said else []


def _not_serving(report: PublishReport) -> Iterable[str]:
    for line in report.engines:
        if line.state != "serving":
            why = f" ({line.reason})" if line.reason else ""
            yield f"{line.engine} is {line.state}{why}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"
