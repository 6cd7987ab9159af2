"""Whether the optimizer, its figures and traces make sense.

check_training(config)
"""

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer

OPTIMIZERS = ("adam",)


def check_training(config: ConfigContainer) -> None:
    """Numbers of the optimizer, the log and the profiler are in range."""
    check_positive(
        {
            "logger.log_interval": config.logger.log_interval,
            "logger.straggler_interval": config.logger.straggler_interval,
            "dist.distributed_timeout_minutes": config.dist.distributed_timeout_minutes,
        }
    )
    profiling = config.profiling
    if profiling.use_pytorch_profiler and not 1 <= profiling.profile_step_start <= profiling.profile_step_end:
        raise ConfigError(
            f"profiling.profile_step_start={profiling.profile_step_start} must be 1 or more and not after "
            f"profiling.profile_step_end={profiling.profile_step_end}"
        )
    check_choice("optimizer.optimizer", config.optimizer.optimizer, OPTIMIZERS)
    if config.optimizer.clip_grad < 0:
        raise ConfigError(f"optimizer.clip_grad={config.optimizer.clip_grad}: use 0 to clip nothing")
