"""From `cfg.peft` to a method.

method = make_method(cfg.peft)
"""

import importlib
from pathlib import Path
from typing import Any

from weightcast.bridges.peft import CanonicalLoRA, DoRA, LoRA
from weightcast.bridges.peft.attach import find_state
from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.peft import check_scheme, is_own
from weightcast.trainer.config import ConfigContainer, PeftConfig
from weightcast.trainer.peft.method import PeftMethod, RecipeMethod

RECIPES: dict[str, type[LoRA]] = {"lora": LoRA, "canonical_lora": CanonicalLoRA, "dora": DoRA}
# What latent attention (MLA) has in place of a query, key and value projection in one.
_LATENT_KEY_VALUE = ("linear_kv_down_proj", "linear_kv_up_proj")
_QUERY_KEY_VALUE = ("linear_qkv", "linear_q", "linear_k", "linear_v")


def make_method(peft: PeftConfig, model_config: Any = None) -> PeftMethod | None:
    """The method of `peft.scheme`; None without one. Raises `ConfigError` for settings that do not fit it.

    `model_config` is the model's, which default targets depend on (latent attention has linears of its own).
    """
    if peft.scheme is None:
        return None
    check_scheme(peft.scheme)
    if is_own(peft.scheme):
        return _make_own(peft, peft.scheme)
    return RecipeMethod(_make_recipe(peft, RECIPES[peft.scheme], model_config))


def method_of(config: ConfigContainer, model: Any) -> PeftMethod | None:
    """The method that was applied to `model` for this run; None where all weights train."""
    if not config.peft.is_used:
        return None
    state = find_state(model)
    return make_method(config.peft) if state is None else RecipeMethod(state.recipe)


def _make_recipe(peft: PeftConfig, kind: type[LoRA], model_config: Any) -> LoRA:
    given: dict[str, Any] = {
        "target_modules": tuple(peft.target_modules) or default_targets(kind, model_config),
        "exclude_modules": tuple(peft.exclude_modules),
        "dim": peft.dim,
        "rank_pattern": dict(peft.rank_pattern),
        "alpha_pattern": dict(peft.alpha_pattern),
        "use_rslora": peft.use_rslora,
        "dropout": peft.dropout,
        "dropout_position": peft.dropout_position,
        "lora_A_init_method": peft.lora_A_init_method,
    }
    if peft.alpha is not None:
        given["alpha"] = peft.alpha
    return kind(**given)


def default_targets(kind: type[LoRA], model_config: Any) -> tuple[str, ...]:
    """All linears of attention and MLP, by the recipe's defaults."""
    plain = tuple(kind.target_modules)
    if not getattr(model_config, "multi_latent_attention", False):
        return plain
    query = ("linear_q_proj",) if not model_config.q_lora_rank else ("linear_q_down_proj", "linear_q_up_proj")
    return (*query, *_LATENT_KEY_VALUE, *(target for target in plain if target not in _QUERY_KEY_VALUE))


def _make_own(peft: PeftConfig, scheme: str) -> PeftMethod:
    module, _, function = scheme.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"peft.scheme={scheme!r} cannot be imported: {error}; name a module on PYTHONPATH and a function in it"
        ) from error
    method: PeftMethod | LoRA = make(peft)
    return RecipeMethod(method) if isinstance(method, LoRA) else method


def check_adapter_folder(peft: PeftConfig) -> None:
    """Raise `ConfigError` when `peft.load_adapter` is no folder; what is in it is checked with the model."""
    if peft.load_adapter is not None and not Path(peft.load_adapter).is_dir():
        raise ConfigError(f"peft.load_adapter={peft.load_adapter!r} is no folder; name one that peft saved")
