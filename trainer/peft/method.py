"""What a method of finetuning is to the trainer, and the base class for your own.

A method freezes the base weights, adds or chooses what trains, and says what engines get in place of a frozen weight.
Of your own one, `peft.scheme=my_module:make` names a function from `cfg.peft` to the method:

    class Gains(OwnMethod):  # examples/own_adapter.py, whole
        def transform(self, module, name): ...  # add parameters under module.adapter
        def merged_weight(self, module, name): ...  # what engines get for module.weight

    make = Gains

Where ranks share a linear (TP2), a method also marks its parameters as Megatron's are (`tensor_model_parallel`,
`sequence_parallel`) and gives modules a `sharded_state_dict` for them; `weightcast.bridges.peft.attach` and `layers`
show how. A method may as well be a recipe derived from `LoRA`, for which all of that is done.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from weightcast.bridges.peft import LoRA
from weightcast.bridges.peft.attach import find_state, whole_name
from weightcast.bridges.peft.merged_views import Merge, merges_of
from weightcast.bridges.shards import Model, unwrap_chunks
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import PeftConfig


class PeftMethod(Protocol):
    """What the trainer asks of a method."""

    def apply(self, model: Model) -> None:
        """Freeze the base and put on what trains: `requires_grad` says which. Every rank calls it, before DDP."""
        ...

    def merges(self, model: Model) -> dict[torch.Tensor, Merge]:
        """What stands for which frozen weight where whole weights leave the model. Raises `ConfigError` for none."""
        ...

    def describe(self) -> dict[str, Any]:
        """The settings that a checkpoint must have been made with, as JSON holds them."""
        ...


class RecipeMethod:
    """LoRA, canonical LoRA or DoRA of `weightcast.bridges.peft`; a recipe derived from them too."""

    def __init__(self, recipe: LoRA) -> None:
        self.recipe = recipe

    def apply(self, model: Model) -> None:
        """As `LoRA.apply`, unless the model came with adapters of these settings (of a folder, or from a provider)."""
        if find_state(model) is None:
            self.recipe.apply(model)

    def merges(self, model: Model) -> dict[torch.Tensor, Merge]:
        """Of each adapted linear."""
        return merges_of(model)

    def describe(self) -> dict[str, Any]:
        """The recipe's settings, but for dropout and first values, which may change from one run to the next."""
        given = dataclasses.asdict(self.recipe)
        free = ("dropout", "dropout_position", "lora_A_init_method", "lora_B_init_method")
        return {"scheme": type(self.recipe).__name__} | {key: value for key, value in given.items() if key not in free}


class OwnMethod(ABC):
    """A user's method: see the module. A subclass has `transform` at least."""

    def __init__(self, peft: PeftConfig) -> None:
        self.peft = peft

    @abstractmethod
    def transform(self, module: nn.Module, name: str) -> nn.Module | None:
        """Called with each module of the model and its name in the whole model; returns its replacement, if any.

        Parameters that are added go under a child named `adapter`, which keeps them out of the base's names.
        """

    def trains(self, name: str) -> bool:
        """Whether the parameter `name` of a chunk trains; by default those of adapters."""
        return ".adapter." in name

    def merged_weight(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """The weight that engines get for `module.weight`, on this rank; None where it is as it is. No collective."""
        return None

    def apply(self, model: Model) -> None:
        """Freeze, transform, and let train. Every rank calls it. Raises `ConfigError` when nothing would train."""
        chunks = unwrap_chunks(model)
        for chunk in chunks:
            chunk.requires_grad_(False)
            for path, module in list(chunk.named_modules())[1:]:
                replacement = self.transform(module, whole_name(chunk, path))
                if replacement is not None:
                    parent, _, last = path.rpartition(".")
                    setattr(chunk.get_submodule(parent), last, replacement)
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(self.trains(name))

    def merges(self, model: Model) -> dict[torch.Tensor, Merge]:
        """Of each module that `merged_weight` answers for."""
        found = dict(self._find_merges(unwrap_chunks(model)))
        adds = any(".adapter." in name for chunk in unwrap_chunks(model) for name, _ in chunk.named_parameters())
        if adds and not found:
            raise ConfigError(
                f"{type(self).__name__} adds parameters and has no merged_weight, so engines and exported folders "
                "would be without them: give it one, or leave publish.to and checkpoint.export_hf out"
            )
        return found

    def describe(self) -> dict[str, Any]:
        """The section `peft`, but for folders."""
        given = dataclasses.asdict(self.peft)
        return {key: value for key, value in given.items() if key not in ("load_adapter", "export_adapter", "dropout")}

    def _find_merges(self, chunks: Sequence[nn.Module]) -> Iterator[tuple[torch.Tensor, Merge]]:
        for chunk in chunks:
            for path, module in chunk.named_modules():
                weight = getattr(module, "weight", None)
                if path and isinstance(weight, torch.Tensor):
                    name = whole_name(chunk, path)
                    with torch.no_grad():
                        answered = self.merged_weight(module, name) is not None
                    if answered:
                        yield weight, OwnMerge(partial(self._merge, module, name))

    @torch.no_grad()
    def _merge(self, module: nn.Module, name: str) -> torch.Tensor:
        weight = self.merged_weight(module, name)
        assert weight is not None
        return weight


@dataclasses.dataclass(frozen=True, slots=True)
class OwnMerge:
    """A user's weight; no rank needs another for it."""

    make: partial[torch.Tensor]

    def prepare(self) -> None:
        """Nothing."""

    def __call__(self) -> torch.Tensor:
        return self.make()
