"""From the fields of an HF configuration to those of a provider, for what most decoders have in common.

Each function reads one part of an HF configuration and returns provider fields; a family's `translate` joins those it
needs. A value that Megatron would compute differently is refused by `UnsupportedModel` with the field, its value and
the remedy. Ropes are read in `config_rope`.
"""

from collections.abc import Callable, Mapping

import torch
from transformers import PretrainedConfig

from weightcast.bridges.config_quantization import require_readable_weights, unnamed_dtype
from weightcast.bridges.config_refusals import Fields as Fields
from weightcast.bridges.config_refusals import refuse as refuse
from weightcast.bridges.config_refusals import require_absent as require_absent
from weightcast.bridges.config_rope import rope_fields as rope_fields
from weightcast.bridges.config_rope import rope_parameters as rope_parameters


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation, `gelu_pytorch_tanh` in HF."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by a sigmoid (gpt-oss). Megatron's own is compiled at its first call, for which not every machine can."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
}


def activation(hf: PretrainedConfig, name: str = "hidden_act") -> Callable[[torch.Tensor], torch.Tensor]:
    """The MLP's activation function."""
    value = getattr(hf, name)
    if value not in ACTIVATIONS:
        refuse(hf, name, value, "no such activation here", f"one of {sorted(ACTIVATIONS)} works")
    return ACTIVATIONS[value]


def head_dim(hf: PretrainedConfig) -> int:
    """Elements of one attention head; independent of hidden_size where the configuration names it."""
    named = getattr(hf, "head_dim", None)
    size: int = named if named is not None else hf.hidden_size // hf.num_attention_heads
    return size


def model_dtype(hf: PretrainedConfig) -> torch.dtype:
    """The checkpoint's dtype; where the configuration does not say, fp32, or bf16 of quantised weights."""
    dtype = getattr(hf, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if dtype is None:
        return unnamed_dtype(hf)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        refuse(hf, "dtype", dtype, "Megatron holds parameters in fp32, bf16 or fp16", "convert the checkpoint first")
    chosen: torch.dtype = dtype
    return chosen


def decoder_fields(hf: PretrainedConfig) -> Fields:
    """Sizes, norms and numbers that every Llama-like decoder has."""
    require_readable_weights(hf)
    dtype = model_dtype(hf)
    groups = getattr(hf, "num_key_value_heads", None)
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": groups if groups is not None else hf.num_attention_heads,
        "kv_channels": head_dim(hf),
        "vocab_size": hf.vocab_size,
        "seq_length": hf.max_position_embeddings,
        "share_embeddings_and_output_weights": bool(hf.tie_word_embeddings),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "init_method_std": hf.initializer_range,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": float(getattr(hf, "attention_dropout", None) or 0.0),
        "attention_softmax_in_fp32": True,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }


def bias_fields(qkv: bool, attention_output: bool, mlp: bool) -> Fields:
    """Which linears have a bias. Megatron's `add_bias_linear` is the default of all that are not named."""
    return {
        "add_bias_linear": attention_output or mlp,
        "add_qkv_bias": qkv,
        "qkv_bias": qkv,
        "attention_output_bias": attention_output,
        "mlp_bias": mlp,
    }


def sliding_window_fields(hf: PretrainedConfig) -> Fields:
    """The window of the layers that `layer_types` calls sliding_attention.

    HF's window counts the query itself, Megatron's left bound does not. `window_attn_skip_freq` as a list holds 1 for
    each layer that has the window (megatron/core/transformer/utils.py, `is_layer_window_attention`).
    """
    kinds: list[str] = list(getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != hf.num_hidden_layers:
        why = f"each of the {hf.num_hidden_layers} layers is full_attention or sliding_attention here"
        refuse(hf, "layer_types", unknown or kinds, why, "use a model of such layers")
    window = getattr(hf, "sliding_window", None)
    sliding = [int(kind == "sliding_attention") for kind in kinds]
    if not any(sliding):
        return {}
    if window is None or window < 1:
        refuse(hf, "sliding_window", window, "some layers have sliding attention", "set its length in tokens")
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": sliding}


def uniform_window_fields(hf: PretrainedConfig) -> Fields:
    """The window of all layers, for models that have it wherever `sliding_window` is set."""
    window = getattr(hf, "sliding_window", None)
    if window is None:
        return {}
    if window < 1:
        refuse(hf, "sliding_window", window, "all layers have sliding attention", "set its length in tokens, or null")
    return {"window_size": (window - 1, 0)}
