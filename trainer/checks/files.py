"""Whether the files that a run writes have a place.

check_checkpoint(config)
"""

from pathlib import Path

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_positive
from weightcast.trainer.config import ConfigContainer


def check_checkpoint(config: ConfigContainer) -> None:
    """What is to be saved has a place."""
    check_positive(
        {
            "checkpoint.save_interval": config.checkpoint.save_interval,
            "checkpoint.most_recent_k": config.checkpoint.most_recent_k,
        }
    )
    if config.checkpoint.async_save and config.checkpoint.save is None:
        raise ConfigError("checkpoint.async_save is set and checkpoint.save is not: say where to save")
    for name in ("finetune", "ckpt_step"):
        if getattr(config.checkpoint, name) and config.checkpoint.load is None:
            raise ConfigError(f"checkpoint.{name} is set and checkpoint.load is not: say which folder to load from")
    pretrained = config.checkpoint.pretrained_checkpoint
    if pretrained is not None and not Path(pretrained).is_dir():
        raise ConfigError(f"checkpoint.pretrained_checkpoint: there is no folder {pretrained!r}")
