"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`, as the `peft` library writes them.

Reading checks what is there before it is believed, and refuses what this package does not compute; vLLM and `peft`
read what is written here. The settings that matter are `AdapterConfig`; which modules are adapted is read from the
tensors, since a folder's `target_modules` may be a pattern or name modules that are not there.

    folder = read_adapter(Path("my-lora"))
    folder.config.r, folder.weights()["model.layers.0.self_attn.q_proj.weight"]
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightcast.bridges.peft.names import LORA_A, LORA_B, LORA_MAGNITUDE, split_peft_name
from weightcast.bridges.peft.recipes import LoRA
from weightcast.bridges.peft.settings import UpdateSettings, Value, find_settings, shorten
from weightcast.sync.checkpoint_files import CheckpointFiles, open_file
from weightcast.sync.errors import CheckpointMismatch, UnsupportedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings that change what an adapter computes or stores, and the values under which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an `adapter_config.json` says that bears on values."""

    r: int
    lora_alpha: float
    use_dora: bool = False
    use_rslora: bool = False
    base_model: str | None = None
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks than `r`, by regular expressions for the ends of modules' names, of which the first counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas than `lora_alpha`, likewise."""

    @staticmethod
    def of_recipe(recipe: LoRA, base_model: str | None, settings: Mapping[str, UpdateSettings]) -> "AdapterConfig":
        """`recipe` in PEFT's words, with the `settings` of each weight that it adapts."""
        modules = {weight.removesuffix(".weight"): own for weight, own in settings.items()}
        return AdapterConfig(
            r=recipe.dim,
            lora_alpha=recipe.alpha,
            use_dora=recipe.use_dora,
            use_rslora=recipe.use_rslora,
            base_model=base_model,
            lora_dropout=recipe.dropout,
            rank_pattern=shorten({name: own.rank for name, own in modules.items()}, recipe.dim),
            alpha_pattern=shorten({name: own.alpha for name, own in modules.items()}, recipe.alpha),
        )

    def settings_of(self, weights: Iterable[str]) -> dict[str, UpdateSettings]:
        """The rank and the scaling of each of `weights`, by the base model's names."""
        default = UpdateSettings(self.r, self.lora_alpha, self.use_rslora)
        return find_settings(default, self.rank_pattern, self.alpha_pattern, weights)

    def as_json(self, target_modules: Sequence[str]) -> str:
        """The text of the file."""
        fields: dict[str, Any] = {
            "alpha_pattern": {name: _as_written(alpha) for name, alpha in self.alpha_pattern.items()},
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": _as_written(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": list(target_modules),
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }
        return json.dumps(fields, indent=2) + "\n"


def _as_written(alpha: float) -> float:
    """An alpha that is a whole number as `peft` writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A PEFT folder whose tensors are complete: each adapted weight has its A and B and, with DoRA, its magnitudes."""

    config: AdapterConfig
    files: CheckpointFiles
    settings: Mapping[str, UpdateSettings]
    """The rank and scaling of each adapted weight of the base model, by HF's names."""

    def weights(self) -> dict[str, tuple[str, ...]]:
        """The adapted weights of the base model, in HF's names, and the names of their tensors here."""
        found: dict[str, list[str]] = {}
        for spec in self.files.specs:
            split = split_peft_name(spec.name)
            assert split is not None, spec.name
            found.setdefault(split[0], []).append(spec.name)
        return {name: tuple(tensors) for name, tensors in found.items()}


def read_adapter(folder: Path) -> AdapterFolder:
    """Open a PEFT folder; headers only.

    Raises `CheckpointMismatch` when a file is missing, damaged, incomplete or of another rank than it says,
    `UnsupportedModel` for a kind of adapter that is not LoRA or DoRA as it is computed here.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointMismatch(
                f"{folder} has no {name}; give a folder that peft's save_pretrained or save_hf_adapter wrote (pickled "
                ".bin files are never read: load them with peft and save them again)"
            )
    config = _read_config(folder / CONFIG_FILE)
    files = open_file(folder / WEIGHTS_FILE)
    return AdapterFolder(config, files, _check_names(files, config))


def _read_config(path: Path) -> AdapterConfig:
    with _damaged(path):
        fields: dict[str, Any] = dict(json.loads(path.read_text()))
    _refuse_other_kinds(path, fields)
    with _damaged(path):
        return AdapterConfig(
            r=int(fields["r"]),
            lora_alpha=float(fields["lora_alpha"]),
            use_dora=bool(fields.get("use_dora", False)),
            use_rslora=bool(fields.get("use_rslora", False)),
            base_model=fields.get("base_model_name_or_path"),
            lora_dropout=float(fields.get("lora_dropout", 0.0)),
            rank_pattern=_read_pattern(fields.get("rank_pattern"), int),
            alpha_pattern=_read_pattern(fields.get("alpha_pattern"), float),
        )


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Say so when what is read here is no configuration of an adapter."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointMismatch(
            f"{path} is not the configuration of a LoRA adapter ({error!r}); save the adapter again with peft"
        ) from error


def _refuse_other_kinds(path: Path, fields: Mapping[str, Any]) -> None:
    for name, allowed in _NEUTRAL.items():
        if (got := fields.get(name, allowed[0])) not in allowed:
            raise UnsupportedModel(
                f"{path} has {name}={got!r}, which is not computed here; allowed is {allowed[0]!r}: merge the "
                "adapter with peft, or train one without"
            )
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
        raise UnsupportedModel(
            f"{path} has init_lora_weights={init!r}, which changes the base model's weights as well; convert the "
            "adapter to a plain one with peft's path_initial_model_for_weight_conversion"
        )


def _read_pattern(pattern: Mapping[str, Any] | None, kind: type[Value]) -> dict[str, Value]:
    """Numbers above 0 by regular expression. Raises `ValueError`, `re.error`, and others for what is no such thing."""
    numbers = {str(re.compile(key).pattern): kind(value) for key, value in (pattern or {}).items()}
    if wrong := {key: value for key, value in numbers.items() if value <= 0}:
        raise ValueError(f"{wrong} is not above 0")
    return numbers


def _check_names(files: CheckpointFiles, config: AdapterConfig) -> dict[str, UpdateSettings]:
    """The settings of each adapted weight."""
    found: dict[str, set[str]] = {}
    for spec in files.specs:
        split = split_peft_name(spec.name)
        if split is None:
            raise CheckpointMismatch(
                f"{spec.name} in {files.files[spec.name]} is no tensor of a LoRA adapter; only lora_A, lora_B and "
                "lora_magnitude_vector of linear modules are read"
            )
        found.setdefault(split[0], set()).add(split[1])
    settings = config.settings_of(found)
    for spec in files.specs:
        weight, tensor = split_peft_name(spec.name) or ("", "")
        want = settings[weight].rank
        if {LORA_A: spec.shape[0], LORA_B: spec.shape[-1]}.get(tensor, want) != want:
            said = f"r={want}" if want == config.r else f"r={want} for it in rank_pattern"
            raise CheckpointMismatch(
                f"{spec.name} has shape {spec.shape}, but {CONFIG_FILE} says {said}; take both files of the same "
                "adapter"
            )
    wanted = {LORA_A, LORA_B, *([LORA_MAGNITUDE] if config.use_dora else [])}
    for weight, tensors in found.items():
        if tensors != wanted:
            different = sorted(tensors ^ wanted)
            raise CheckpointMismatch(
                f"{files.folder}: of the adapter of {weight} there is {'no' if different[0] in wanted else 'also'} "
                f"{different[0]}, with use_dora={config.use_dora}; save the adapter again"
            )
    if not found:
        raise CheckpointMismatch(f"{files.folder} holds no tensor of an adapter; save the adapter again")
    return settings
