"""Recipes: what to adapt and how. LoRA, canonical LoRA and DoRA, in the words of the trainer.

A recipe is applied to a model that has its base weights and is not yet wrapped for data parallelism:

    provider = bridge.to_megatron_provider()
    provider.register_pre_wrap_hook(LoRA(dim=16, alpha=32, target_modules=["linear_qkv", "linear_proj"]))
    model = provider.provide_distributed_model()

Then only the adapters train, and only they are in the gradients' buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron.core.transformer.module import MegatronModule

from weightcast.bridges.peft.attach import attach_adapters
from weightcast.bridges.peft.names import PARTS, applies, select_parts
from weightcast.bridges.peft.settings import UpdateSettings, Value
from weightcast.bridges.shards import Model
from weightcast.sync.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank update beside each target; a fused linear (`linear_qkv`, gated `linear_fc1`) has one A for its parts.

    Raises `ConfigError` for settings out of range.
    """

    target_modules: Sequence[str] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Last names of linears, or patterns for whole names (`*.layers.0.*.linear_proj`); lists are taken too."""
    exclude_modules: Sequence[str] = ()
    """Of those, the linears to leave alone; written alike."""
    dim: int = 32
    """The rank of the update."""
    alpha: float = 32
    """The update is multiplied by alpha / dim."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Other ranks than `dim`, by targets written as in `target_modules`, of which the first that fits counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Other alphas, likewise."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(dim) instead."""
    dropout: float = 0.0
    """Probability; of the adapter's inputs or outputs, not the base's."""
    dropout_position: Literal["pre", "post"] = "pre"
    lora_A_init_method: Literal["xavier", "kaiming", "zero"] = "xavier"
    """Normal with Xavier's deviation, or uniform as Kaiming's (PEFT's default)."""
    lora_B_init_method: Literal["zero"] = "zero"

    use_dora: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.dim < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dim={self.dim}, dropout={self.dropout}: dim must be at least 1, dropout at least 0 and below 1"
            )
        if self.dropout_position not in ("pre", "post") or self.lora_A_init_method not in ("xavier", "kaiming", "zero"):
            raise ConfigError(
                f"dropout_position={self.dropout_position!r}, lora_A_init_method={self.lora_A_init_method!r}: allowed "
                "are 'pre' and 'post', and 'xavier', 'kaiming' and 'zero'"
            )
        if self.lora_B_init_method != "zero":
            raise ConfigError(
                f"lora_B_init_method={self.lora_B_init_method!r}: adapters start as no change, with 'zero'"
            )
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name linears to adapt, such as 'linear_qkv'")
        if wrong := {key: rank for key, rank in self.rank_pattern.items() if rank < 1}:
            raise ConfigError(f"rank_pattern={wrong}: ranks must be at least 1")
        for target in (*self.target_modules, *self.rank_pattern, *self.alpha_pattern):
            self._check_kind(target)

    def _check_kind(self, target: str) -> None:
        last = target.rpartition(".")[2]
        if last in PARTS and not self.takes_parts:
            raise ConfigError(
                f"{type(self).__name__} adapts fused linears as a whole; target {PARTS[last][0]!r} instead of "
                f"{last!r}, or use CanonicalLoRA"
            )

    @property
    def scaling(self) -> float:
        """What the update B·A is multiplied with where no pattern says otherwise."""
        return UpdateSettings(self.dim, self.alpha, self.use_rslora).scaling

    def settings_of(self, linear: str, part: str = "") -> UpdateSettings:
        """Of `linear`, by its name in the whole model, or of a part of it that is adapted by itself. Pure."""

        def look_up(pattern: Mapping[str, Value], default: Value) -> Value:
            return next((value for target, value in pattern.items() if applies(target, linear, part)), default)

        return UpdateSettings(
            look_up(self.rank_pattern, self.dim), look_up(self.alpha_pattern, self.alpha), self.use_rslora
        )

    def parts_of(self, linear: str) -> tuple[str, ...] | None:
        """How `linear`, by its name in the whole model, is adapted: as `names.select_parts`. Pure."""
        if self.exclude_modules and select_parts(linear, self.exclude_modules) is not None:
            return None
        return select_parts(linear, self.target_modules)

    def apply(self, model: Model) -> list[MegatronModule]:
        """Freeze the base weights of `model`, this rank's chunks, and put adapters on the targets. Every rank calls it.

        The adapters' first values do not depend on the layout. Raises `ConfigError` when a target is no linear of the
        model, when there are adapters already, or when the model is already wrapped; `UnsupportedModel` for a target
        that cannot have an adapter.
        """
        return attach_adapters(self, model)

    def __call__(self, model: Model, training: bool = True) -> list[MegatronModule]:
        """`apply`, as a hook of a provider or as trainers call it."""
        chunks = self.apply(model)
        for chunk in chunks:
            chunk.train(training)
        return chunks


@dataclass(frozen=True, kw_only=True)
class CanonicalLoRA(LoRA):
    """LoRA with an A of its own for query, key and value, and for gate and up: what `peft` trains on an HF model."""

    target_modules: Sequence[str] = (
        "linear_q",
        "linear_k",
        "linear_v",
        "linear_proj",
        "linear_fc1_up",
        "linear_fc1_gate",
        "linear_fc2",
    )
    takes_parts: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA with a trained magnitude of each of the weight's rows; targets may be fused linears or their parts.

    Apply it after the base weights are loaded: the magnitudes start as the norms of their rows.
    """

    alpha: float = 64
    use_dora: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        LoRA.__post_init__(self)
        if self.dropout_position != "pre":
            raise ConfigError("DoRA drops inputs only; leave dropout_position at 'pre'")
