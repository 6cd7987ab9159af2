"""Which rank is slow: every rank's own forward time, compared with its peers in the same pipeline stage.

A step takes as long as its slowest rank, and on every other rank the time goes into waiting, so the time of a step
tells nothing. The forward of a rank's own layers does; ranks of another stage have other layers.

    pretrain adds StragglerWatch(cfg) to the callbacks; logger.straggler_interval=100 turns it on.
"""

import logging
import socket
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from weightcast.bridges.runtime import current_device
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.figures import StepReport
from weightcast.trainer.state import TrainState

logger = logging.getLogger(__name__)

_HOST_BYTES = 64


@dataclass(frozen=True, slots=True)
class RankTime:
    """One rank's mean time in its own forward passes of a step."""

    rank: int
    host: str
    stage: int
    forward_s: float


@dataclass(frozen=True, slots=True)
class StragglerReport:
    """The rank that is slowest beside its peers."""

    slowest: RankTime
    peers_s: float
    """Median over the ranks of its stage."""

    @property
    def ratio(self) -> float:
        """How many times as long as the median it takes."""
        return self.slowest.forward_s / self.peers_s if self.peers_s > 0 else 1.0


def find_straggler(times: list[RankTime]) -> StragglerReport:
    """The rank with the highest ratio to the median of its stage. Pure."""
    medians = {
        stage: median(time.forward_s for time in times if time.stage == stage)
        for stage in {time.stage for time in times}
    }
    reports = [StragglerReport(time, medians[time.stage]) for time in times]
    return max(reports, key=lambda report: report.ratio)


class StragglerWatch(Callback):
    """Reports every `logger.straggler_interval` steps, on rank 0. A collective on those steps."""

    def __init__(self, config: ConfigContainer) -> None:
        self._interval = config.logger.straggler_interval
        self._forward_s: list[float] = []

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        if self._interval is None:
            return
        if report.skipped is None:
            self._forward_s.append(report.phases_s["forward"])
        if report.step % self._interval or not self._forward_s:
            return
        own_s = sum(self._forward_s) / len(self._forward_s)
        self._forward_s.clear()
        found = find_straggler(gather_times(own_s))
        if dist.get_rank() == 0:
            logger.info(
                "stragglers up to step %d: rank %d on %s takes %.3f s forward, %.2f times the median of stage %d",
                report.step,
                found.slowest.rank,
                found.slowest.host,
                found.slowest.forward_s,
                found.ratio,
                found.slowest.stage,
            )


def gather_times(forward_s: float) -> list[RankTime]:
    """Every rank's time, on every rank. A collective."""
    device = current_device()
    name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
    own = torch.tensor(
        [forward_s, parallel_state.get_pipeline_model_parallel_rank(), *name], dtype=torch.float64, device=device
    )
    everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, own)
    rows = [row.tolist() for row in everyones]
    return [
        RankTime(
            rank, bytes(int(letter) for letter in letters).rstrip(b"\0").decode(errors="replace"), int(stage), time_s
        )
        for rank, (time_s, stage, *letters) in enumerate(rows)
    ]
