"""Whether optimizer, schedule and gradient buffers fit each other.

check_training(config)
"""

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.config.precision import PRECISIONS

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
MIXED_PRECISION = (None, *PRECISIONS)
OPTIMIZERS = ("adam",)


def check_training(config: ConfigContainer) -> None:
    """Optimizer, schedule and gradient buffers fit each other."""
    check_positive(
        {
            "logger.log_interval": config.logger.log_interval,
            "dist.distributed_timeout_minutes": config.dist.distributed_timeout_minutes,
        }
    )
    check_choice("optimizer.optimizer", config.optimizer.optimizer, OPTIMIZERS)
    check_choice("scheduler.lr_decay_style", config.scheduler.lr_decay_style, LR_DECAY_STYLES)
    check_choice("mixed_precision", config.mixed_precision, MIXED_PRECISION)
    if not 0 <= config.optimizer.min_lr <= config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={config.optimizer.min_lr} must lie between 0 and optimizer.lr={config.optimizer.lr}"
        )
    if not 0 <= config.scheduler.lr_warmup_init <= config.optimizer.lr:
        raise ConfigError(f"scheduler.lr_warmup_init must lie between 0 and optimizer.lr={config.optimizer.lr}")
    if config.optimizer.clip_grad < 0:
        raise ConfigError(f"optimizer.clip_grad={config.optimizer.clip_grad}: use 0 to clip nothing")
    decay = decay_iters(config)
    if not 0 <= config.scheduler.lr_warmup_iters < decay:
        raise ConfigError(
            f"scheduler.lr_warmup_iters={config.scheduler.lr_warmup_iters} must be fewer than the {decay} steps "
            f"of the schedule (scheduler.lr_decay_iters, or else train.train_iters)"
        )
    ddp = config.ddp
    if ddp.overlap_param_gather and not (ddp.overlap_grad_reduce and ddp.use_distributed_optimizer):
        raise ConfigError(
            "ddp.overlap_param_gather needs ddp.overlap_grad_reduce=true and ddp.use_distributed_optimizer=true"
        )


def decay_iters(config: ConfigContainer) -> int:
    """Steps of the learning-rate schedule."""
    given = config.scheduler.lr_decay_iters
    return given if given is not None else config.train.train_iters
