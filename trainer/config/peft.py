"""Parameter-efficient finetuning: a frozen base, and adapters that train.

cfg.peft.scheme = "lora"
cfg.peft.dim = 16
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class PeftConfig:
    """Adapters beside frozen weights (`peft/`). Without `scheme` and `load_adapter` all weights train."""

    scheme: str | None = None
    """`lora` (one A for what is one linear in Megatron: q, k and v; gate and up), `canonical_lora` (an A of its own for
    each, as the `peft` library trains), `dora` (with a trained magnitude of each row), or `module:function` of your own
    (`peft/method.py`); null takes that of `load_adapter`, or trains all weights."""
    target_modules: list[str] = field(default_factory=list)
    """Last names of linears (`linear_qkv`, `linear_proj`, `linear_fc1`, `linear_fc2`; canonical and DoRA also
    `linear_q`, `linear_fc1_up`, ...), or patterns for whole names (`*.layers.0.*.linear_proj`); empty means all of
    attention and MLP, experts included."""
    exclude_modules: list[str] = field(default_factory=list)
    """Of those, the linears to leave alone; written alike (`*.mlp.experts.*` leaves experts alone)."""
    dim: int = 32
    """The rank of the update."""
    alpha: float | None = None
    """The update is multiplied by alpha / dim; null means 32, and 64 for DoRA."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks than `dim`, by targets written as in `target_modules`, of which the first that fits counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas, likewise."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(dim) instead."""
    dropout: float = 0.0
    """Probability with which an adapter's inputs (or outputs) are dropped while training; not the base's."""
    dropout_position: str = "pre"
    """`pre` drops inputs, `post` outputs (not with DoRA)."""
    lora_A_init_method: str = "xavier"
    """`xavier` (normal), `kaiming` (uniform, as the `peft` library) or `zero`. B starts as zeros: as no change."""
    options: dict[str, Any] = field(default_factory=dict)
    """Whatever a scheme of your own reads."""
    load_adapter: str | None = None
    """PEFT folder whose adapter training starts from. Without `scheme` its own settings are taken."""
    export_adapter: str | None = None
    """Folder that the adapter is written into as a PEFT folder, after the last step."""

    @property
    def is_used(self) -> bool:
        """Whether the base is frozen."""
        return self.scheme is not None or self.load_adapter is not None
