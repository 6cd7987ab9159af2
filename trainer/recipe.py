"""What the dry run of a layout is asked for as a model: also a run's YAML file or a recipe, whose layout it then takes.

bridge, sizes = open_planned("run.yaml")
bridge, sizes = open_planned("llama3_70b.pretrain")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightcast.bridges import AutoBridge
from weightcast.bridges.standalone_inputs import open_bridge
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ModelConfig
from weightcast.trainer.model_source import open_planned_model
from weightcast.trainer.overrides import load_config
from weightcast.trainer.recipes.registry import load_recipe, recipe_modules

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
_LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


def open_planned(model: str) -> tuple[AutoBridge, Mapping[str, Any]]:
    """The bridge of `model`, and the sizes that it sets, by the names of `weightcast.bridges.dry_run_layout.Layout`.

    `model` is a run's YAML file, a recipe's name, or what `open_bridge` takes, which sets none. Raises `ConfigError`
    for a file that the trainer would refuse, or that names no model.
    """
    if Path(model).suffix in SUFFIXES and Path(model).is_file():
        section = load_config(config_file=model).model
        if not section.hf_path and not section.hf_config:
            raise ConfigError(f"{model} names no model; set model.hf_path in it to a Hugging Face folder or hub id")
    elif model.partition(".")[0] in recipe_modules() and not Path(model).exists():
        section = load_recipe(model).model
    else:
        return open_bridge(model), {}
    bridge, _ = open_planned_model(section)
    return bridge, _sizes(section)


def _sizes(section: ModelConfig) -> dict[str, Any]:
    said = {name: getattr(section, setting) for name, setting in _SETTINGS.items()}
    if isinstance(said["stages"], list):
        said["stages"] = "|".join("".join(_LETTERS[layer] for layer in stage) for stage in said["stages"])
    return {name: value for name, value in said.items() if value is not None}
