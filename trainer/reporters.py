"""Everything that tells of a run, as callbacks: the bar or the log, the sinks, the slow rank, the profiler.

callbacks = open_reporters(cfg, stack)
"""

from contextlib import ExitStack

import torch.distributed as dist
from rich.console import Console

from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.plain_log import lines_on_stderr
from weightcast.trainer.profiling import StepProfiler
from weightcast.trainer.progress import ProgressBar, is_wanted
from weightcast.trainer.sinks import open_sinks
from weightcast.trainer.step_log import StepLog
from weightcast.trainer.stragglers import StragglerWatch


def open_reporters(config: ConfigContainer, stack: ExitStack) -> list[Callback]:
    """This rank's reporters, closed with `stack`. Every rank calls it; raises `ConfigError` for a missing extra."""
    watches: list[Callback] = [StragglerWatch(config)]
    profiling, rank = config.profiling, dist.get_rank()
    if profiling.use_pytorch_profiler and rank in profiling.profile_ranks:
        watches.append(stack.enter_context(StepProfiler(profiling, rank)))
    if rank != 0:
        return watches
    console = Console(stderr=True)
    shown: Callback
    if is_wanted(config, console):
        shown = stack.enter_context(ProgressBar(config, console))
    else:
        stack.enter_context(lines_on_stderr())
        shown = StepLog(config)
    return [shown, *(stack.enter_context(sink) for sink in open_sinks(config)), *watches]
