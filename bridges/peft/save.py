"""Saving adapters as a PEFT folder: gathered to rank 0, which writes them whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from weightcast.bridges.exchange import agreement, get_rank, send_parcels
from weightcast.bridges.hf_export import gather_routes
from weightcast.bridges.parcels import LiveRegions
from weightcast.bridges.peft.folder import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig
from weightcast.bridges.peft.names import split_peft_name
from weightcast.bridges.plan import Plan
from weightcast.bridges.whole_folder import explain_disk, partial_of, start_empty, take_name
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import TensorSpec

# What an adapter's folder may hold beside its two files, and lose when it is replaced.
_COMPANIONS = ("README.md", ".gitattributes")


@torch.no_grad()
def save_adapter(plan: Plan, folder: Path, config: AdapterConfig, base_names: Sequence[str]) -> None:
    """Write the adapters of `plan` to `folder`; every rank must call it, and the ranks share the file system.

    An older adapter of the name is replaced, in one step. `base_names` are the base model's tensors. Raises
    `ConfigError` on every rank when the folder holds anything else, `StorageError` when the disk refuses a write.
    """
    check_room(folder)
    tensors: dict[str, torch.Tensor] = {}
    if get_rank() == 0:
        tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in plan.specs}
    routes = gather_routes(plan)
    send_parcels({0: routes.parcels(plan.specs, to=0)}, LiveRegions(plan.regions), tensors)
    with explain_disk(folder), agreement(f"writing {folder}"):
        if get_rank() == 0:
            _write(folder, tensors, config, target_modules(plan.specs, base_names))


def check_room(folder: Path) -> None:
    """Raise `ConfigError` on every rank unless `folder` may be replaced: not there, empty, or an older adapter."""
    with agreement(f"making room for {folder}"):
        if get_rank() == 0 and folder.exists():
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else [folder.name]
            strange = [name for name in names if name not in (CONFIG_FILE, WEIGHTS_FILE, *_COMPANIONS)]
            if strange:
                raise ConfigError(
                    f"{folder} exists and holds {strange[0]}, which is no part of an adapter; give a folder that is "
                    "new, empty, or an older adapter"
                )


def target_modules(specs: Sequence[TensorSpec], base_names: Sequence[str]) -> list[str]:
    """What `adapter_config.json` names as targets: last names of modules, or whole ones where not all are adapted."""
    splits = (split_peft_name(spec.name) for spec in specs)
    adapted = sorted({split[0].removesuffix(".weight") for split in splits if split is not None})
    last_names = {name.rpartition(".")[2] for name in adapted}
    modules = {name.removesuffix(".weight") for name in base_names if name.endswith(".weight")}
    others = {name.rpartition(".")[2] for name in modules - set(adapted)}
    return adapted if last_names & others else sorted(last_names)


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: AdapterConfig, targets: list[str]) -> None:
    partial = partial_of(folder)
    start_empty(partial)
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / CONFIG_FILE).write_text(config.as_json(targets))
    take_name(partial, folder)
