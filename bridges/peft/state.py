"""What a model with adapters knows of them as a whole; the same on every rank."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightcast.sync.errors import ConfigError

if TYPE_CHECKING:
    from weightcast.bridges.peft.recipes import LoRA


@dataclass
class AdapterState:
    """The recipe that was applied, and whether the weights hold the updates at present."""

    recipe: "LoRA"
    merged: bool = False
    kept_base: bool = False

    def require_merged(self) -> None:
        """Raise `ConfigError` unless the adapters are merged."""
        if not self.merged:
            raise ConfigError(
                "the model has adapters that are not merged, and weights alone would leave them out; export inside "
                "'with merged_adapters(model):' (weightcast.bridges.peft), or save the adapters with save_hf_adapter"
            )
