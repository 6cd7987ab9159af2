"""The whole configuration of a run, written where its results are, so that the same run can be started again.

write_run_config(cfg)
cfg = load_config(config_file="run/checkpoints/run_config.yaml")
"""

import logging
import os
from dataclasses import replace
from pathlib import Path

from weightcast.sync.errors import StorageError
from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.overrides import save_config

logger = logging.getLogger(__name__)

FILE = "run_config.yaml"
_OF_A_PROVIDER = "# The model of this run was a provider made in Python: set model.hf_path to start it again.\n"


def config_path(config: ConfigContainer) -> Path | None:
    """`logger.save_config_filepath`, or else `run_config.yaml` beside the checkpoints; `None` where nothing is kept."""
    if config.logger.save_config_filepath is not None:
        return Path(config.logger.save_config_filepath)
    return None if config.checkpoint.save is None else Path(config.checkpoint.save) / FILE


def write_run_config(config: ConfigContainer) -> Path | None:
    """Write `config`, all of it, and return where; one rank calls it. Raises `StorageError`."""
    path = config_path(config)
    if path is None:
        return None
    known = isinstance(config.model, ModelConfig)
    work = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_config(config if known else replace(config, model=ModelConfig()), work)
        if not known:
            work.write_text(_OF_A_PROVIDER + work.read_text(encoding="utf-8"), encoding="utf-8")
        os.replace(work, path)
    except OSError as error:
        raise StorageError(f"the run's configuration cannot be written to {path}: {error}") from error
    logger.info("the whole configuration is in %s; start it again with --config %s", path, path)
    return path
