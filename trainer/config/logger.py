"""What a run tells of itself.

cfg.logger.log_interval = 10
"""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """What a run tells."""

    log_interval: int = 1
    """Steps between two log lines (rank 0, `logging` level INFO)."""
    events: str | None = None
    """File of JSON lines, one a phase and version (`events.py`); each rank appends to `<events>.<rank>`."""
    save_config_filepath: str | None = None
    """YAML file for the whole configuration of the run, which can start it again; null means `run_config.yaml` in
    `checkpoint.save`, and nowhere when that is not set either."""
