"""Whether the model that is asked for can be laid out and computed as asked.

`check_recompute` looks at the settings alone, `check_provider` at the provider that they made. What does not divide
(heads, experts and layers by their ranks) the provider refuses by itself, in `finalize()`.

check_recompute(config.model)
check_provider(config, provider)
"""

from dataclasses import fields
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer, ModelConfig

GRANULARITIES = (None, "full", "selective")
METHODS = (None, "uniform", "block")
MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")


def check_recompute(model: Any) -> None:
    """Granularity, method and number of layers of the recomputation fit each other."""
    granularity, method, layers = model.recompute_granularity, model.recompute_method, model.recompute_num_layers
    check_choice("model.recompute_granularity", granularity, GRANULARITIES)
    check_choice("model.recompute_method", method, METHODS)
    check_positive({"model.recompute_num_layers": layers})
    if granularity == "full" and (method is None or layers is None):
        raise ConfigError(
            "model.recompute_granularity=full needs model.recompute_method (uniform or block) and "
            "model.recompute_num_layers: uniform and 1 keep least"
        )
    if granularity != "full" and (method is not None or layers is not None):
        raise ConfigError(
            "model.recompute_method and model.recompute_num_layers are for model.recompute_granularity=full: set it, "
            "or set them to null"
        )
    for module in model.recompute_modules or ():
        check_choice("model.recompute_modules", module, MODULES)


def check_provider(config: ConfigContainer, provider: Any) -> None:
    """What depends on whether the model has experts, or sees pictures."""
    experts, tensor = provider.num_moe_experts, provider.tensor_model_parallel_size
    if experts and tensor > 1 and not provider.sequence_parallel:
        # megatron/core/transformer/moe/moe_layer.py refuses it in the first forward pass.
        raise ConfigError(
            f"a model with experts and model.tensor_model_parallel_size={tensor} needs model.sequence_parallel=true"
        )
    if config.dataset.packed_sequence and hasattr(provider, "vision_attention"):
        raise ConfigError(
            "dataset.packed_sequence is set, and the model's positions are those in pictures as well, which packing "
            "does not know: set dataset.packed_sequence=false"
        )
    if not experts:
        _refuse_settings_of_experts(config)


def _refuse_settings_of_experts(config: ConfigContainer) -> None:
    if not isinstance(config.model, ModelConfig):
        return
    for name in (item.name for item in fields(config.model) if item.name.startswith("moe_")):
        if getattr(config.model, name) is not None:
            raise ConfigError(f"model.{name} is set, and the model has no experts: set it to null")
