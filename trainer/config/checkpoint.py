"""Saving, resuming, and the Hugging Face folder at the end.

cfg.checkpoint.save = "run/checkpoints"
"""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Saving (`saving.py`), where a run starts from (`starting.py`), and the Hugging Face folder at the end."""

    save: str | None = None
    """Folder that training checkpoints are saved into; null saves none."""
    save_interval: int | None = None
    """Steps between two checkpoints, where `save` is set; null saves one, after the last step."""
    most_recent_k: int = 2
    """Newest checkpoints that are kept; older ones are removed after a new one is whole."""
    async_save: bool = False
    """Write checkpoints in a process beside the trainer's while training goes on; one becomes the newest when it is
    whole. Costs the memory of one copy of what this rank saves, on a GPU in the host's."""
    load: str | None = None
    """Folder to resume from. If it is also `save` and holds nothing yet, training starts afresh."""
    pretrained_checkpoint: str | None = None
    """Training run's folder, or Megatron checkpoint, of the weights to start from instead of `model.hf_path`'s; with
    `peft` the base's. Weights alone are taken, of any layout; `load` resumes."""
    ckpt_step: int | None = None
    """Step of the checkpoint in `load` to resume from; null means its newest."""
    finetune: bool = False
    """Take the weights alone from `load`, and begin with a new optimizer at step 0."""
    export_hf: str | None = None
    """Folder that the trained model is written into as a Hugging Face checkpoint, after the last step; adapters are
    merged in it."""
