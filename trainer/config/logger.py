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
    straggler_interval: int | None = None
    """Steps between two reports of the slowest rank (`stragglers.py`); null makes none."""
    progress: bool = True
    """Draw a bar in place of log lines where rank 0 has a terminal."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard's event files (extra `tensorboard`); null writes none."""
    wandb_project: str | None = None
    """Project at Weights & Biases (extra `wandb`); null logs nothing there. `WANDB_MODE=offline` keeps it here."""
    wandb_entity: str | None = None
    """User or team whose project it is; null means the default of the account."""
    wandb_exp_name: str | None = None
    """Name of the run there; null lets them choose."""
    wandb_save_dir: str | None = None
    """Folder of their local files; null means `wandb` in the present one."""
    mlflow_experiment: str | None = None
    """Experiment in MLflow (extra `mlflow`); null logs nothing there."""
    mlflow_run_name: str | None = None
    """Name of the run there; null lets MLflow choose."""
    mlflow_tracking_uri: str | None = None
    """Where MLflow keeps runs, such as `http://127.0.0.1:5000`; null means what its environment says."""
