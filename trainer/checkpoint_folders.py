"""Where in a run's folder its checkpoints lie: `iter_0000003`, and a record of the newest.

folder = find_latest("run/checkpoints")
"""

from pathlib import Path

from weightcast.sync.errors import ConfigError

LATEST = "latest_checkpointed_iteration.txt"


def folder_name(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"iter_{step:07d}"


def find_latest(root: str | Path) -> Path | None:
    """The newest whole checkpoint in `root`, by its record; `None` when there is none. Raises `ConfigError`."""
    latest = Path(root) / LATEST
    if not latest.is_file():
        return None
    said = latest.read_text(encoding="utf-8").strip()
    if not said.isdigit():
        raise ConfigError(f"{latest} says {said!r} and no step: name a checkpoint with checkpoint.ckpt_step")
    return Path(root) / folder_name(int(said))
