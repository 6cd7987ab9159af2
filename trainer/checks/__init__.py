"""What must hold between settings, checked before any process group is made.

`check_config` is pure: it looks at the configuration and the number of ranks, and raises the first contradiction
as a `ConfigError` that says what to change.

    layout = check_config(cfg, world_size=4)
    layout.num_microbatches
"""

from weightcast.trainer.checks.data import check_data
from weightcast.trainer.checks.files import check_checkpoint
from weightcast.trainer.checks.layout import Layout, check_layout, check_model
from weightcast.trainer.checks.model import check_recompute
from weightcast.trainer.checks.overlap import check_overlap
from weightcast.trainer.checks.peft import check_peft
from weightcast.trainer.checks.precision import check_precision
from weightcast.trainer.checks.publish import check_publish
from weightcast.trainer.checks.schedule import check_schedule
from weightcast.trainer.checks.training import check_training
from weightcast.trainer.config import ConfigContainer

__all__ = ["Layout", "check_config"]


def check_config(config: ConfigContainer, *, world_size: int) -> Layout:
    """Check all sections against each other and against `world_size` ranks. Raises `ConfigError`."""
    layout = check_layout(config, world_size)
    check_model(config, layout)
    check_recompute(config.model)
    check_training(config)
    check_precision(config)
    check_overlap(config, layout)
    check_schedule(config)
    check_data(config)
    check_checkpoint(config)
    check_publish(config, world_size)
    check_peft(config)
    return layout
