"""Whether the files that a run writes have a place.

check_checkpoint(config)
"""

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
