"""Names: which linears an adapter is asked for, and what its tensors are called in Megatron and in PEFT. Pure.

The trainer's names are those of Megatron-Bridge, so that its users' settings and checkpoints carry over. A target is
the last part of a linear's name, or a pattern for all of it with the number of the layer in the whole model:

    select_parts("decoder.layers.3.self_attention.linear_qkv", ("*.layers.3.*.linear_q",))  # ("adapter_q",)
    peft_name("model.layers.3.self_attn.q_proj.weight", LORA_A)
    # base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from weightcast.sync.errors import ConfigError

# In Megatron.
LINEAR_IN, LINEAR_OUT, MAGNITUDE = "linear_in.weight", "linear_out.weight", "weight_magnitude"
QKV_PARTS = ("adapter_q", "adapter_k", "adapter_v")
GATE_UP_PARTS = ("adapter_gate", "adapter_up")
# Targets that are a part of a fused linear: its name, and the part's.
PARTS: dict[str, tuple[str, str]] = {
    "linear_q": ("linear_qkv", "adapter_q"),
    "linear_k": ("linear_qkv", "adapter_k"),
    "linear_v": ("linear_qkv", "adapter_v"),
    "linear_fc1_gate": ("linear_fc1", "adapter_gate"),
    "linear_fc1_up": ("linear_fc1", "adapter_up"),
}

# In PEFT.
LORA_A, LORA_B, LORA_MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
PEFT_PREFIX = "base_model.model."
_WEIGHT = ".weight"
# All experts of a layer are one global tensor, under a name of its own.
_EXPERTS, _GLOBAL_EXPERTS = ".experts.", ".experts.experts."


def linear_of_key(key: str) -> str | None:
    """The linear whose weight has the global Megatron key `key`, as targets name it; None for any other tensor."""
    module = key.removesuffix(_WEIGHT)
    is_linear = module != key and module.rpartition(".")[2].startswith("linear_")
    return module.replace(_GLOBAL_EXPERTS, _EXPERTS) if is_linear else None


def peft_name(hf: str, tensor: str) -> str:
    """PEFT's name for an adapter's `tensor` (`LORA_A`, ...) of the weight that is called `hf` in the base model."""
    return f"{PEFT_PREFIX}{hf.removesuffix(_WEIGHT)}.{tensor}"


def split_peft_name(name: str) -> tuple[str, str] | None:
    """The base model's weight and the kind of tensor, from a name in a PEFT folder; None when it is no LoRA's."""
    for tensor in (LORA_A, LORA_B, LORA_MAGNITUDE):
        if name.startswith(PEFT_PREFIX) and name.endswith(f".{tensor}"):
            return name.removeprefix(PEFT_PREFIX).removesuffix(f".{tensor}") + _WEIGHT, tensor
    return None


def matches(target: str, linear: str) -> bool:
    """Whether the target is the linear's last name, or a pattern (`*` stands for anything) for the whole."""
    return target == linear.rpartition(".")[2] or fnmatchcase(linear, target)


def fused_target(target: str) -> tuple[str, str | None]:
    """The target of the linear itself, and the part of it that is meant (None for all of it)."""
    stem, dot, last = target.rpartition(".")
    fused, part = PARTS.get(last, (last, None))
    return f"{stem}{dot}{fused}", part


def applies(target: str, linear: str, part: str = "") -> bool:
    """Whether the target means `linear`, or the `part` of it that is adapted by itself."""
    fused, own = fused_target(target)
    return matches(fused, linear) and own in (None, part)


def select_parts(linear: str, targets: Iterable[str]) -> tuple[str, ...] | None:
    """How the targets want `linear` adapted: None for not at all, () as a whole, or the parts to adapt one by one.

    Raises `ConfigError` when they want both the whole and a part.
    """
    found = {part for fused, part in map(fused_target, targets) if matches(fused, linear)}
    if not found:
        return None
    if None in found and len(found) > 1:
        raise ConfigError(
            f"target_modules want {linear} adapted as a whole and in parts ({', '.join(sorted(filter(None, found)))}); "
            "name either the linear or its parts"
        )
    return tuple(part for part in (*QKV_PARTS, *GATE_UP_PARTS) if part in found)
