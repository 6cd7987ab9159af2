"""What becomes of publish reports: a line in the log, a file of JSON lines, Prometheus metrics. On rank 0 alone.

with Reporting(cfg.publish) as reporting:
    reporting.take(publisher.publish(version=7), blocked_s=0.6)
"""

import logging
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from weightcast.sync import PublishReport
from weightcast.sync.metrics import PublishMetrics, format_report
from weightcast.sync.report_log import ReportLog
from weightcast.trainer.config import PublishConfig

logger = logging.getLogger(__name__)


class Reporting:
    """Opens what `publish.report_log` and `publish.metrics_port` name; a context manager.

    Raises `StorageError` where the file cannot be written, `AddressError` where the port cannot be had, and
    `ConfigError` where the extra `metrics` is not installed.
    """

    def __init__(self, publish: PublishConfig) -> None:
        self._stack = ExitStack()
        self._log = None if publish.report_log is None else ReportLog(Path(publish.report_log))
        self._metrics = None if publish.metrics_port is None else PublishMetrics()
        if self._metrics is not None:
            assert publish.metrics_port is not None
            server = self._stack.enter_context(self._metrics.serve(publish.metrics_port, publish.metrics_host))
            logger.info("metrics at http://%s/metrics", server.address)

    def take(self, report: PublishReport, blocked_s: float) -> None:
        """Tell of one version, for which `publish` held this rank up for `blocked_s`."""
        logger.info("%s; step held up for %.2f s", format_report(report), blocked_s)
        if self._log is not None:
            self._log.append(report)
        if self._metrics is not None:
            self._metrics.observe(report)

    def close(self) -> None:
        """Stop answering Prometheus."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
