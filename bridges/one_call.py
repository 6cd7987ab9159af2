"""Whole conversions behind one call of `AutoBridge`: without a model in a lone process, through one under torchrun.

bridge.import_ckpt("path/to/hf", "checkpoints/qwen3")
"""

from pathlib import Path
from typing import TYPE_CHECKING

from weightcast.bridges.process_groups import runs_alone

if TYPE_CHECKING:
    from weightcast.bridges.auto import AutoBridge


def import_ckpt(bridge: "AutoBridge", folder: Path) -> None:
    """Write the bridge's weights to `folder` as a Megatron checkpoint. Every rank must call it."""
    if not runs_alone():
        bridge.save_megatron_model(bridge.to_megatron_model(wrap_with_ddp=False), folder)
        return
    from weightcast.bridges.standalone_import import import_checkpoint  # imports AutoBridge

    import_checkpoint(bridge, folder)


def export_ckpt(bridge: "AutoBridge", checkpoint: Path, folder: Path, show_progress: bool) -> None:
    """Write the weights of a Megatron checkpoint to the HF folder `folder`. Every rank must call it."""
    if not runs_alone():
        bridge.save_hf_pretrained(bridge.load_megatron_model(checkpoint), folder, show_progress)
        return
    from weightcast.bridges.standalone_export import export_checkpoint  # imports AutoBridge

    export_checkpoint(bridge, checkpoint, folder, show_progress=show_progress)
