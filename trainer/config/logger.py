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
