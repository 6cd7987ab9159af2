"""A run's YAML file as a model and a layout, for whoever wants to know of a run without starting it.

recipe = read_recipe("run.yaml")
print(recipe.model, recipe.sizes)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.trainer.overrides import load_config

SUFFIXES = (".yaml", ".yml")
# Fields of a dry run's layout, and the settings of the section `model` that say them.
_SETTINGS = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual": "virtual_pipeline_model_parallel_size",
    "stages": "pipeline_model_parallel_layout",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run's file says of its model; `sizes` by the names of `weightcast.bridges.dry_run_layout.Layout`."""

    model: str
    """Hugging Face folder or hub id."""
    sizes: Mapping[str, Any]
    """Those that the file or the defaults set."""


def is_recipe(path: str | Path) -> bool:
    """Whether `path` is a YAML file, by its name."""
    return Path(path).suffix in SUFFIXES and Path(path).is_file()


def read_recipe(path: str | Path) -> Recipe:
    """Read a run's YAML file. Raises `ConfigError` for one that the trainer would refuse, or that names no model."""
    model = load_config(config_file=str(path)).model
    if not model.hf_path:
        raise ConfigError(f"{path} names no model; set model.hf_path in it to a Hugging Face folder or hub id")
    said = {name: getattr(model, setting, None) for name, setting in _SETTINGS.items()}
    return Recipe(model.hf_path, {name: value for name, value in said.items() if value is not None})
