"""Where a run starts from: a checkpoint of its own, the weights of another, or what the provider gave.

start_from(state, cfg.checkpoint)
"""

import logging
from pathlib import Path

from weightcast.bridges import megatron_checkpoint
from weightcast.sync.errors import ConfigError
from weightcast.trainer.checkpoint import load_checkpoint
from weightcast.trainer.checkpoint_folders import LATEST, find_latest, folder_name
from weightcast.trainer.config import CheckpointConfig
from weightcast.trainer.peft.pretrained import load_pretrained
from weightcast.trainer.state import TrainState, unwrap

logger = logging.getLogger(__name__)


def start_from(state: TrainState, checkpoint: CheckpointConfig) -> None:
    """Resume from `checkpoint.load`, or begin with the weights that the settings name.

    Every rank calls it; a collective. Raises `ConfigError` when `load` holds no checkpoint, unless this run saves there
    too, and when a checkpoint is of another model (`CheckpointMismatch` where the weights alone are wanted).
    """
    found = None if checkpoint.load is None else _find(checkpoint)
    if found is not None and not checkpoint.finetune:
        load_checkpoint(state, found)
        logger.info("resumed from %s at step %d", found, state.step)
    elif found is not None:
        load_weights(state, found)
    elif checkpoint.pretrained_checkpoint is not None and not state.config.peft.is_used:
        # Adapters lie on these weights already.
        load_pretrained([unwrap(chunk) for chunk in state.model], checkpoint.pretrained_checkpoint)
        state.optimizer.reload_model_params()
        logger.info("weights of %s", checkpoint.pretrained_checkpoint)


def load_weights(state: TrainState, folder: Path) -> None:
    """Put the weights in `folder` into the model and the optimizer's masters, and nothing else. A collective."""
    megatron_checkpoint.load_checkpoint([unwrap(chunk) for chunk in state.model], folder)
    state.optimizer.reload_model_params()
    logger.info("weights of %s", folder)


def _find(checkpoint: CheckpointConfig) -> Path | None:
    """The checkpoint that `load` means; `None` when it has none and training may start afresh."""
    assert checkpoint.load is not None
    root = Path(checkpoint.load)
    if checkpoint.ckpt_step is not None:
        folder = root / folder_name(checkpoint.ckpt_step)
        if not folder.is_dir():
            steps = sorted(path.name for path in root.glob("iter_*"))
            raise ConfigError(
                f"checkpoint.ckpt_step={checkpoint.ckpt_step}: there is no {folder}; checkpoint.load has "
                f"{', '.join(steps) or 'none'}"
            )
        return folder
    found = find_latest(root)
    is_own = checkpoint.save is not None and Path(checkpoint.save) == root
    if found is None and not is_own and checkpoint.pretrained_checkpoint is None:
        raise ConfigError(
            f"checkpoint.load={checkpoint.load!r} holds no checkpoint (no {LATEST}): name a folder that training "
            f"saved into, or leave checkpoint.load out to start afresh"
        )
    return found
