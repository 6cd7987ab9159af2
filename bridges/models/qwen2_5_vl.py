"""Qwen2.5-VL: Qwen2.5 with multimodal rope behind a vision tower.

The language model is Qwen2's table under `language_model.`; the vision tower is transformers' own, so that its tensors
keep their names. HF names are those on disk (`visual.`, `model.`, `lm_head.`), which transformers also writes; in
memory it has others.
"""

import copy

from transformers import PretrainedConfig

from weightcast.bridges.config import (
    Fields,
    activation,
    bias_fields,
    decoder_fields,
    refuse,
    rope_fields,
    rope_parameters,
    sliding_window_fields,
)
from weightcast.bridges.models import qwen2, tables
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.provider_vl import Qwen25VLModelProvider
from weightcast.bridges.rules import Rename, Rule

LANGUAGE_MODEL, VISUAL = "language_model.", "visual."
_LINEAR = ("weight", "bias")
_VISION_LINEARS = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Of each block of the vision tower, and of what is in front of and behind the blocks.
VISION_BLOCK: tuple[str, ...] = (
    "norm1.weight",
    "norm2.weight",
    *(f"{linear}.{kind}" for linear in _VISION_LINEARS for kind in _LINEAR),
)
VISION_ENDS: tuple[str, ...] = (
    "patch_embed.proj.weight",
    "merger.ln_q.weight",
    *(f"merger.mlp.{index}.{kind}" for index in (0, 2) for kind in _LINEAR),
)
_DEFAULT_SECTIONS = (16, 24, 24)


def text_config(hf: PretrainedConfig) -> PretrainedConfig:
    """The language model's own configuration, with what only the whole model's says."""
    text = copy.deepcopy(hf.text_config)
    text.tie_word_embeddings = bool(hf.tie_word_embeddings)
    text.architectures = hf.architectures
    text.dtype = hf.dtype if hf.dtype is not None else text.dtype
    if getattr(hf, "quantization_config", None) is not None:
        text.quantization_config = hf.quantization_config
    return text


def mrope_fields(hf: PretrainedConfig, text: PretrainedConfig) -> Fields:
    """The rope's frequencies, and how many rotated pairs turn by time, height and width each."""
    parameters = rope_parameters(text)
    sections = list(parameters.pop("mrope_section", None) or _DEFAULT_SECTIONS)
    size = text.hidden_size // text.num_attention_heads
    if 2 * sum(sections) != size:
        why = f"a head has {size} dimensions, which are {size // 2} pairs to share out"
        refuse(hf, "text_config.rope_parameters.mrope_section", sections, why, "correct the configuration")
    kind = parameters.get("rope_type")
    if kind == "longrope":
        why = "its frequencies follow from the largest position, not from the length"
        refuse(hf, "text_config.rope_parameters.rope_type", kind, why, "use one of default, linear, llama3, yarn")
    return rope_fields(text, parameters) | {"mrope_section": sections}


def translate(hf: PretrainedConfig) -> Qwen25VLModelProvider:
    """The provider for a `Qwen2_5_VLForConditionalGeneration` configuration."""
    text = text_config(hf)
    if (got := hf.vision_config.out_hidden_size) != text.hidden_size:
        why = f"the language model's hidden size is {text.hidden_size}"
        refuse(hf, "vision_config.out_hidden_size", got, why, "correct the configuration")
    return Qwen25VLModelProvider(
        **decoder_fields(text)
        | bias_fields(qkv=True, attention_output=False, mlp=False)
        | sliding_window_fields(text)
        | mrope_fields(hf, text)
        | {"activation_func": activation(text), "hf_config": hf}
    )


def rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    """The rule table for a `Qwen2_5_VLForConditionalGeneration` configuration."""
    blocks = (f"blocks.{number}.{name}" for number in range(hf.vision_config.depth) for name in VISION_BLOCK)
    vision = tuple(Rename(f"{VISUAL}{name}", f"{VISUAL}{name}") for name in (*VISION_ENDS, *blocks))
    return vision + tables.under(LANGUAGE_MODEL, qwen2.rules(text_config(hf)))


# The names in memory, under which some versions of transformers 4 have written; it and vLLM read both.
IN_MEMORY = {VISUAL: "model.visual.", "model.": "model.language_model."}

QWEN2_5_VL = ModelBridge(
    "qwen2_5_vl",
    ("Qwen2_5_VLForConditionalGeneration",),
    rules,
    translate,
    spellings=(IN_MEMORY,),
    in_memory=IN_MEMORY,
)
