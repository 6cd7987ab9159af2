"""Whether the files that a run reads and writes are there.

check_data(config)
check_checkpoint(config)
"""

from pathlib import Path

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer

DATASET_KINDS = ("text", "mock")


def check_checkpoint(config: ConfigContainer) -> None:
    """What is to be saved has a place."""
    check_positive(
        {
            "checkpoint.save_interval": config.checkpoint.save_interval,
            "checkpoint.most_recent_k": config.checkpoint.most_recent_k,
        }
    )


def check_data(config: ConfigContainer) -> None:
    """Files that are named are there."""
    check_choice("dataset.kind", config.dataset.kind, DATASET_KINDS)
    check_positive(
        {
            "dataset.seq_length": config.dataset.seq_length,
            "dataset.max_bytes": config.dataset.max_bytes,
        }
    )
    for name in dict.fromkeys(config.dataset.files):
        if not Path(name).is_file():
            raise ConfigError(f"dataset.files: there is no file {name!r}")
