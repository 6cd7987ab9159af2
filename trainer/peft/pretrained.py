"""`checkpoint.pretrained_checkpoint`: weights to start from, of a training run or of `weightcast import`.

load_pretrained(model, "run/checkpoints")
"""

from pathlib import Path
from typing import Any

from weightcast.bridges.megatron_checkpoint import load_checkpoint
from weightcast.sync.errors import CheckpointMismatch, ConfigError
from weightcast.trainer.checkpoint_folders import find_latest
from weightcast.trainer.peft.record import find_record


def find_folder(given: str) -> Path:
    """The checkpoint itself: the newest of a run's folder, or the folder that is given. Raises `ConfigError`."""
    folder = find_latest(Path(given).absolute()) or Path(given).absolute()
    if not folder.is_dir():
        raise ConfigError(f"checkpoint.pretrained_checkpoint={given!r}: there is no folder {folder}")
    if find_record(folder) is not None:
        raise ConfigError(
            f"checkpoint.pretrained_checkpoint={given!r} holds adapters only; name the checkpoint of their base, and "
            f"resume the adapters with checkpoint.load={given}"
        )
    return folder


def load_pretrained(model: list[Any], given: str) -> None:
    """Fill the weights of `model`, which has no adapters yet, in any layout. Every rank calls it; a collective.

    Raises `ConfigError` for a folder without checkpoint or with adapters only, and for one of another model.
    """
    try:
        load_checkpoint(model, find_folder(given))
    except CheckpointMismatch as error:
        raise ConfigError(f"checkpoint.pretrained_checkpoint={given!r} is not of this model: {error}") from error
