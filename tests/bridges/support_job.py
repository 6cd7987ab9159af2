"""The support job: bits, logits and gradients of models in layouts, one reading for each pair.

Every rank runs `take_readings` (through `run_ranks`); the folders are those that `support_families` writes. A model is
filled with NaN, imported without a collective, exported to full tensors and saved as a folder, all compared with the
file bit by bit, and then computes.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tests.bridges.layout_tables import KINDS, STAGES, WITH_GRADIENTS
from tests.bridges.no_collectives import no_collectives
from tests.bridges.test_bits import build, check_regions, check_same_files, import_one

from weightcast.bridges import AutoBridge
from weightcast.bridges.models.prediction import num_prediction_layers
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.checkpoint_files import CheckpointFiles, open_checkpoint

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.parity_job import largest_gradient_difference, logits_difference  # isort: skip
from tests.bridges.support_families import family_of  # isort: skip

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

# The bias for the choice of experts moves after each step, which is not a gradient.
STILL = {"moe_router_bias_update_rate": 0.0}


@dataclass(frozen=True)
class Reading:
    """What was seen of one model in one layout, the worst over all ranks."""

    model: str
    layout: str
    logits: float
    """Largest difference to transformers."""
    gradients: float | None
    """Of the loss, and of a gradient in relation to its tensor's largest; None where it was not looked at."""
    num_tensors: int
    num_changed: int
    """HF tensors whose bits, dtype or place in the order were others after import and export."""


def take_readings(out: str, cells: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Readings of `cells`, each (model, layout), in order of layouts; every rank gives the same."""
    readings: list[dict[str, Any]] = []
    for kind, layouts in KINDS.items():
        for layout, sizes in layouts[dist.get_world_size()].items():
            for model in [cell[0] for cell in cells if family_of(cell[0]).kind == kind and cell[1] == layout]:
                try:
                    readings.append(vars(read_one(Path(out, model), layout, sizes)))
                except Exception as error:
                    raise AssertionError(f"{model} in {layout}") from error
            destroy_model_parallel()
    return readings


def read_one(folder: Path, layout: str, sizes: Mapping[str, Any]) -> Reading:
    """The reading of the model in `folder`; a collective. Fails where an import or a saved folder is not the file."""
    bridge, checkpoint = AutoBridge.from_hf_pretrained(folder / "model"), open_checkpoint(folder / "model")
    sizes = _with_all_predictions(bridge, sizes)
    model = build(bridge, dict(sizes))
    with no_collectives():
        import_one(bridge, model, checkpoint)
        check_regions(list(bridge.weight_source(model).held()), checkpoint)
    num_changed = count_changed(bridge, model, checkpoint)
    check_saved(bridge, model, checkpoint, folder / "saved")
    family, gradients = family_of(folder.name), None
    if family.logits is not None:
        logits = family.logits(folder, dict(sizes))
    else:
        logits = logits_difference(folder, [chunk.eval() for chunk in model])
    if layout in WITH_GRADIENTS:
        compare = family.gradients if family.gradients is not None else largest_gradient_difference
        gradients = compare(folder, dict(sizes) | STILL)
    return Reading(folder.name, layout, logits, gradients, len(checkpoint.specs), num_changed)


def _with_all_predictions(bridge: AutoBridge, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """`sizes`, whose list of stages has one prediction layer (m), for as many as the model has."""
    layers = "m" * num_prediction_layers(bridge.hf_config)
    return dict(sizes) | ({STAGES: sizes[STAGES].replace("m", layers)} if STAGES in sizes else {})


def count_changed(bridge: AutoBridge, model: "list[MegatronModule]", checkpoint: CheckpointFiles) -> int:
    """How many tensors of an export to full tensors are not the file's, name, order, dtype and bits."""
    exported = list(bridge.export_hf_weights(model, cpu=True))
    same = 0
    with checkpoint.reader() as reader:
        for (name, tensor), spec in zip(exported, checkpoint.specs, strict=True):
            wanted = reader.read(spec.whole())
            same += name == spec.name and tensor.dtype == spec.dtype and torch.equal(tensor, wanted)
    return len(exported) - same


def check_saved(bridge: AutoBridge, model: "list[MegatronModule]", checkpoint: CheckpointFiles, folder: Path) -> None:
    """Save in small files, read back and compare on every rank, and remove."""
    bridge.save_hf_pretrained(model, folder, shard_bytes=50_000, show_progress=False)
    check_same_files(folder, checkpoint)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
