"""The plan of a model's adapters: which tensors of a PEFT folder this rank holds, and where.

It is a plan as any other, laid from rules that are derived from the base model's, so that saving, loading and
streaming go the way that weights go, in every layout.
"""

from collections.abc import Sequence

import torch

from weightcast.bridges.peft.attach import find_state
from weightcast.bridges.peft.recipes import LoRA
from weightcast.bridges.peft.rules import adapter_rules, adapter_specs
from weightcast.bridges.plan import Plan, lay_rules, read_dimensions, read_stages
from weightcast.bridges.rules import Rule
from weightcast.bridges.shards import Model, is_adapter_key, read_shards, unwrap_chunks
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import TensorSpec


def build_adapter_plan(model: Model, rules: Sequence[Rule], base_specs: Sequence[TensorSpec]) -> Plan:
    """The plan of this rank for the adapters of `model`, from its family's `rules` and the base model's HF tensors.

    Issues no collective. Raises `ConfigError` when the model has no adapters, `UnmappedTensor` for an adapter that PEFT
    has no names for.
    """
    recipe = require_recipe(model)
    chunks = unwrap_chunks(model)
    dimensions = read_dimensions(chunks[0], rules, base_specs)
    derived = adapter_rules(rules, dimensions.num_layers, recipe)
    shards = [shard for shard in read_shards(chunks) if is_adapter_key(shard.key)]
    specs = adapter_specs(derived, base_specs, adapter_dtype(model))
    return lay_rules(shards, read_stages(chunks), dimensions, derived, specs)


def require_recipe(model: Model) -> LoRA:
    """The recipe that was applied to `model`. Raises `ConfigError` when none was."""
    state = find_state(model)
    if state is None:
        raise ConfigError(
            "the model has no adapters; apply LoRA, CanonicalLoRA or DoRA of weightcast.bridges.peft to it first"
        )
    return state.recipe


def adapter_dtype(model: Model) -> torch.dtype:
    """The dtype of the model's adapters, the same on every rank: that of its weights."""
    dtype: torch.dtype = unwrap_chunks(model)[0].config.params_dtype
    return dtype
