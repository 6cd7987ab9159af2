"""Which tensors of a model are published as FP8, under which names, and what an engine must be told. Pure.

Every tensor is either quantised or kept, by its HF name: the linear layers of decoder blocks are quantised; vectors,
embeddings, output layers, routers and vision towers are kept, as in the FP8 checkpoints of DeepSeek and Qwen. A matrix
that no rule knows is refused, so that a new architecture cannot be quantised, or left out, by accident.

    plan = plan_fp8(specs, Fp8Scheme("fp8_block"))
    plan.engine_config()   # for config.json: {"quantization_config": ...} tells vLLM and SGLang how to read the rest
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from weightcast.sync.errors import ConfigError
from weightcast.sync.quantize import BLOCK, CODES, DIVIDE_ON_GPU, DIVISIONS, Block, Shape, grid_shape
from weightcast.sync.regions import TensorSpec

FP8_BLOCK = "fp8_block"
FP8_TENSOR = "fp8_tensor"
KINDS = (FP8_BLOCK, FP8_TENSOR)
FP8 = "fp8"
COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = (FP8, COMPRESSED_TENSORS)

WEIGHT = ".weight"
LINEAR = frozenset({
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
})  # fmt: skip
"""Last words of the names of modules that are quantised."""
KEPT = frozenset({"embed_tokens", "lm_head", "head", "gate", "router", "shared_expert_gate", "eh_proj"})
"""Last words of the names of modules that are kept: embeddings, output layers, routers, the input of MTP layers."""
KEPT_TOWERS = frozenset({"visual", "vision_tower", "vision_model", "multi_modal_projector"})
"""Words in the names of everything that is kept."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Modules that engines lay together as one matrix, and quantise as one when they have one scale a tensor.

vLLM makes one scale of several by quantising the codes again, through fp16 (`requantize_with_max_scale`): with one
scale for all from the start that changes nothing, unless the weights are as small as `MIN_FUSED_AMAX`.
"""
MIN_FUSED_AMAX = 0.01325
"""Below it the smallest codes of fused matrices are lost to fp16's subnormals while vLLM 0.32 loads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Scheme:
    """How a model is quantised. Raises `ConfigError` for an unknown setting."""

    kind: str
    """`fp8_block` (a scale for each 128 x 128) or `fp8_tensor` (one for each matrix)."""
    format: str = FP8
    """Names of the scales: `fp8`, as DeepSeek and Qwen publish, or `compressed-tensors`, as llm-compressor does."""
    keep: tuple[str, ...] = ()
    """Modules to keep besides: names or parts of them in whole words (`mlp.down_proj`), or patterns with `*`."""
    also: tuple[str, ...] = ()
    """Modules, in the same way, that no rule knows and that are to be quantised; experts stacked in one tensor too."""
    dtype: torch.dtype = torch.bfloat16
    """What the engine would have quantised from: weights are rounded to it first."""
    division: str = DIVIDE_ON_GPU
    """`gpu` or `cpu`: on what the engine would have computed the scales of blocks (`quantize.DIVISIONS`)."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("format", self.format, FORMATS),
            ("division", self.division, DIVISIONS),
        ):
            if value not in allowed:
                raise ConfigError(f"Fp8Scheme.{name}={value!r} is not one of: {', '.join(allowed)}")

    @property
    def scale_suffix(self) -> str:
        """What follows a tensor's name in the name of its scales."""
        return "_scale_inv" if (self.kind, self.format) == (FP8_BLOCK, FP8) else "_scale"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor that is published as codes and scales."""

    source: TensorSpec
    codes: TensorSpec
    scales: TensorSpec
    block: Block
    group: str
    """Tensors of one group share their scale; alone, a tensor's group is its name."""

    @property
    def grid(self) -> Shape:
        """Blocks along each dimension. The scales have this shape, but for two ones at its end with one a matrix."""
        return grid_shape(self.source.shape, self.block)


@dataclass(frozen=True, slots=True)
class Fp8Plan:
    """Every tensor of a model: what is quantised, by name, and what is kept."""

    scheme: Fp8Scheme
    specs: tuple[TensorSpec, ...]
    """What is published, in HF order, scales behind their codes."""
    quantized: Mapping[str, Quantized]
    kept_modules: tuple[str, ...]
    """Modules with a kept matrix, full names, in HF order."""

    def engine_config(self) -> dict[str, Any]:
        """What `config.json` must hold for an engine to read these tensors: `quantization_config`, in JSON's types."""
        make = _fp8_config if self.scheme.format == FP8 else _compressed_tensors_config
        return {"quantization_config": make(self)}


def plan_fp8(specs: Sequence[TensorSpec], scheme: Fp8Scheme) -> Fp8Plan:
    """Decide for every tensor. Raises `ConfigError` for matrices that no rule knows, for a name in `keep` or `also`
    that matches nothing, and where a part of what engines lay together is kept and another is not."""
    _check_patterns(specs, scheme)
    unknown = [spec for spec in specs if _is_quantized(spec, scheme) is None]
    if unknown:
        listed = "; ".join(f"{spec.name} {spec.shape}" for spec in unknown[:5])
        raise ConfigError(
            f"no rule says whether {len(unknown)} tensor(s) are to be quantised: {listed}. Name their modules in "
            "`keep` (publish.modules_to_not_convert) to publish them as they are, or in `also` to quantise them"
        )
    chosen = {spec.name: spec for spec in specs if _is_quantized(spec, scheme)}
    groups = _find_groups(specs, chosen)
    quantized = {name: _quantized(spec, scheme, groups.get(name, name)) for name, spec in chosen.items()}
    published: list[TensorSpec] = []
    for spec in specs:
        found = quantized.get(spec.name)
        published += [spec] if found is None else [found.codes, found.scales]
    kept = dict.fromkeys(module_of(s.name) for s in specs if s.name not in chosen and len(s.shape) > 1)
    return Fp8Plan(scheme, tuple(published), quantized, tuple(kept))


def kept_by_config(config: Mapping[str, Any], specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """The modules that a `quantization_config` of a checkpoint leaves alone, for `Fp8Scheme.keep`.

    Entries that name nothing of this model (older checkpoints list its norms by other names) are left out. Raises
    `ConfigError` for blocks of another size, and for entries that are regular expressions.
    """
    blocks = config.get("weight_block_size")
    if blocks is not None and tuple(blocks) != BLOCK:
        raise ConfigError(f"the model's quantization_config has weight_block_size {blocks}; {list(BLOCK)} is made here")
    listed = config.get("ignored_layers") or config.get("modules_to_not_convert") or config.get("ignore") or ()
    if found := [entry for entry in listed if entry.startswith("re:")]:
        raise ConfigError(f"quantization_config leaves out {found[0]!r}: write it as a name or a pattern with `*`")
    specs = tuple(specs)
    return tuple(entry for entry in listed if any(matches(spec.name, entry) for spec in specs))


def module_of(name: str) -> str:
    """The module of a parameter: `model.layers.0.mlp.gate.weight` → `model.layers.0.mlp.gate`."""
    return name.rpartition(".")[0]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern with `*` fits the module of a tensor or the tensor's name, or whole words are part of it."""
    if "*" in pattern:
        return fnmatchcase(module_of(name), pattern) or fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _check_patterns(specs: Sequence[TensorSpec], scheme: Fp8Scheme) -> None:
    for setting, patterns in (("keep", scheme.keep), ("also", scheme.also)):
        for pattern in patterns:
            if not any(matches(spec.name, pattern) for spec in specs):
                raise ConfigError(
                    f"{setting}: {pattern!r} is part of no tensor's name; names look like {specs[0].name!r}, "
                    "and patterns have a `*`"
                )


def _is_quantized(spec: TensorSpec, scheme: Fp8Scheme) -> bool | None:
    """None where no rule knows."""
    words = spec.name.split(".")
    if any(matches(spec.name, pattern) for pattern in scheme.keep):
        return False
    if len(spec.shape) < 2 or not spec.dtype.is_floating_point or KEPT_TOWERS & set(words):
        return False
    if any(matches(spec.name, pattern) for pattern in scheme.also):
        return True
    if len(spec.shape) == 2 and spec.name.endswith(WEIGHT):
        if words[-2] in LINEAR:
            return True
        if words[-2] in KEPT:
            return False
    return None


def _quantized(spec: TensorSpec, scheme: Fp8Scheme, group: str) -> Quantized:
    block = BLOCK if scheme.kind == FP8_BLOCK else (max(1, spec.shape[-2]), max(1, spec.shape[-1]))
    shape = grid_shape(spec.shape, block)
    scales = TensorSpec(
        spec.name + scheme.scale_suffix, torch.float32, shape if scheme.kind == FP8_BLOCK else shape[:-2]
    )
    return Quantized(
        spec, TensorSpec(spec.name, CODES, spec.shape), scales, block, group if scheme.kind == FP8_TENSOR else spec.name
    )


def _find_groups(specs: Iterable[TensorSpec], chosen: Mapping[str, TensorSpec]) -> dict[str, str]:
    """By name, the group of each tensor that engines lay together with others."""
    groups: dict[str, str] = {}
    names = {spec.name for spec in specs}
    for name in names:
        module, _, parameter = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        for fused in FUSED:
            if last not in fused or parameter != "weight":
                continue
            together = [n for word in fused if (n := f"{parent}.{word}.weight") in names]
            kept = [n for n in together if n not in chosen]
            if kept and len(kept) < len(together):
                raise ConfigError(
                    f"{', '.join(kept)} would be kept and {', '.join(sorted(set(together) - set(kept)))} quantised; "
                    "engines lay them together as one matrix: keep all of them or none"
                )
            groups[name] = together[0]
    return groups


def _fp8_config(plan: Fp8Plan) -> dict[str, Any]:
    config: dict[str, Any] = {"quant_method": FP8, "fmt": "e4m3", "activation_scheme": "dynamic"}
    if plan.scheme.kind == FP8_BLOCK:
        config["weight_block_size"] = list(BLOCK)
    return config | {"modules_to_not_convert": list(plan.kept_modules)}


def _compressed_tensors_config(plan: Fp8Plan) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    if plan.scheme.kind == FP8_BLOCK:
        weights = number | {"strategy": "block", "block_structure": list(BLOCK), "dynamic": False}
        inputs = number | {"strategy": "group", "group_size": BLOCK[1], "dynamic": True}
    else:
        weights = number | {"strategy": "tensor", "dynamic": False}
        inputs = number | {"strategy": "tensor", "dynamic": True}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": list(plan.kept_modules),
    }
