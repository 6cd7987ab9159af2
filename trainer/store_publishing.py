"""Publishing into a store of versions, in the words of a `WeightPublisher`: what `publish.to=/shared/versions` does.

publisher = StorePublisher(source, cfg.publish, config_from=anchor_folder(cfg))
publication = publisher.begin(version=step, timeout_s=60)     # written when it returns, and served, with a policy
publication.wait().phases_s                                    # pack, write, meet; stage and commit
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from weightcast.sync import DeltaMode, DiskPublisher, PublishReport, Span, WeightSource
from weightcast.sync.disk.key_file import read_key
from weightcast.sync.disk.reports import as_publish_report
from weightcast.trainer.config import ConfigContainer, ModelConfig, PublishConfig, delta_mode, parse_policy

logger = logging.getLogger(__name__)

_ANCHOR_EVERY = 25
_KEEP = 5


@dataclass(frozen=True, slots=True)
class WrittenVersion:
    """A version that lies in a store; as a `Publication` that has ended."""

    report: PublishReport

    def wait(self) -> PublishReport:
        """Its report."""
        return self.report

    def packed(self) -> Span:
        """When this rank packed it."""
        return next(span for span in self.report.spans if span.phase == "pack")


class StorePublisher:
    """A `DiskPublisher` by the settings of `publish`. Every rank makes one and calls it alike.

    Raises the errors of `DiskPublisher`, and `ConfigError` for a key file that cannot be read.
    """

    def __init__(self, source: WeightSource, publish: PublishConfig, *, config_from: Path | None = None) -> None:
        assert publish.to is not None
        self._is_first_rank = source.rank == 0
        self._delta = cast(DeltaMode, delta_mode(publish))
        self._publisher = DiskPublisher(
            source,
            publish.to,
            delta=self._delta,
            anchor_every=_ANCHOR_EVERY if publish.anchor_every is None else publish.anchor_every,
            keep=_KEEP if publish.keep is None else publish.keep,
            timeout_s=publish.timeout_s,
            config_from=config_from,
            key=read_key(None if publish.key_file is None else Path(publish.key_file)),
            policy=None if publish.policy is None else parse_policy(publish.policy),
        )

    def wait_for_subscribers(self, count: int, timeout_s: float) -> None:
        """Wait for engines of the fleet, if for any."""
        if count:
            self._publisher.wait_for_subscribers(count, timeout_s)

    def begin(self, version: int, *, timeout_s: float, hold: bool = False) -> WrittenVersion:
        """Write the weights as they are; with a policy, wait until the fleet serves them."""
        assert not hold, "checks refuse publish.hold_next_step with a store"
        report = self._publisher.publish(version, timeout_s=timeout_s)
        mode = "off" if not report.has_delta else "zstd" if self._delta == "zstd" else "on"
        written = as_publish_report(report, mode)
        if self._is_first_rank:
            logger.info("version %d: %s", version, written.why)
        return WrittenVersion(written)

    def close(self) -> None:
        """Let go of the store; what is written stays."""
        self._publisher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def anchor_folder(cfg: ConfigContainer) -> Path | None:
    """Whose configuration and tokenizer go into a store's whole versions; None where they would not fit the weights."""
    publish = cfg.publish
    if publish.config_from is not None:
        return Path(publish.config_from)
    is_as_loaded = publish.peft == "merged" and publish.quantize == "none"
    if not is_as_loaded or not isinstance(cfg.model, ModelConfig) or not cfg.model.hf_path:
        return None
    folder = Path(cfg.model.hf_path)
    return folder if folder.is_dir() else None
