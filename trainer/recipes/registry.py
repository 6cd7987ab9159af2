"""Finds recipes by their short names: `llama32_1b.pretrain` is `pretrain_config()` of the module `llama32_1b`.

There is nothing to register with: a recipe is a module in one of this folder's families, or anywhere else by the name
that Python knows it by (`my_package.my_model:pretrain_config`).

    cfg = load_recipe("llama32_1b.pretrain")
    cfg = load_recipe("llama32_1b.sft")
    cfg = load_recipe("llama32_1b.lora")  # peft_config(scheme="lora")
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import weightcast.trainer.recipes
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer

# What stands behind the dot, the function that makes it, and what that is called with.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain_config", {}),
    "sft": ("sft_config", {}),
    "lora": ("peft_config", {"scheme": "lora"}),
    "dora": ("peft_config", {"scheme": "dora"}),
}


def recipe_modules() -> dict[str, str]:
    """The short names of all recipes of this folder, sorted, and the modules they are in. Imports none of them."""
    found: dict[str, str] = {}
    root = weightcast.trainer.recipes
    for family in pkgutil.iter_modules(root.__path__, f"{root.__name__}."):
        if family.ispkg:
            path = importlib.import_module(family.name).__path__
            found |= {item.name.rpartition(".")[2]: item.name for item in pkgutil.iter_modules(path, f"{family.name}.")}
    return dict(sorted(found.items()))


def is_fine_tuning(name: str) -> bool:
    """Whether `name` stands for one of this folder's recipes that start from trained weights."""
    kind = name.partition(".")[2]
    return ":" not in name and kind in KINDS and KINDS[kind][0] != "pretrain_config"


def load_recipe(name: str) -> ConfigContainer:
    """The configuration that `name` stands for, made anew. Raises `ConfigError` with the nearest name there is."""
    config = _find(name)()
    if not isinstance(config, ConfigContainer):
        raise ConfigError(f"recipe={name}: it gives a {type(config).__name__}, and a recipe gives a ConfigContainer")
    return config


def _find(name: str) -> Callable[[], Any]:
    if ":" in name:
        return _find_anywhere(*name.split(":", 1))
    model, _, kind = name.partition(".")
    modules = recipe_modules()
    if model not in modules:
        raise ConfigError(
            f"there is no recipe {model!r}; {_nearest(model, list(modules))}`weightcast recipes` lists all"
        )
    kind = kind or "pretrain"
    if kind not in KINDS:
        raise ConfigError(f"recipe={name}: {kind!r} is none of {', '.join(KINDS)}; write {model}.{next(iter(KINDS))}")
    function, arguments = KINDS[kind]
    return partial(getattr(importlib.import_module(modules[model]), function), **arguments)


def _find_anywhere(module: str, function: str) -> Callable[[], Any]:
    try:
        loaded: ModuleType = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"recipe={module}:{function}: the module cannot be imported: {error}") from error
    made: Callable[[], Any] | None = getattr(loaded, function, None)
    if not callable(made):
        raise ConfigError(f"recipe={module}:{function}: {module} has no function {function}")
    return made


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
