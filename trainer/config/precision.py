"""What weights are held, computed and reduced in: the setting `mixed_precision`, a name or a record.

The names are Megatron-Bridge's, and each stands for a record:

    cfg.mixed_precision = "bf16_mixed"
    cfg.mixed_precision = MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False)
    precision_record(cfg.mixed_precision).dtype
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightcast.sync.errors import ConfigError

DTYPE_FIELDS = ("params_dtype", "pipeline_dtype", "autocast_dtype")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "float": "float32", "half": "float16"}


@dataclass(slots=True, kw_only=True)
class MixedPrecisionConfig:
    """Number formats of weights, products and gradients. Dtypes may be given as torch's (`torch.bfloat16`) or by name.

    Fields that are null follow from others, or are what the model's and the `ddp` section say.
    """

    fp32: bool = False
    """Hold and compute weights in fp32."""
    fp16: bool = False
    """In fp16, with fp32 masters in the optimizer and a scaled loss. One at most of these three is true; if none is,
    `params_dtype` decides, and without it the checkpoint's dtype."""
    bf16: bool = False
    """In bf16, with fp32 masters in the optimizer."""
    params_dtype: str | None = None
    """`float32`, `bfloat16` or `float16`: the same as the three above, which it must agree with; null follows them."""
    pipeline_dtype: str | None = None
    """Of what pipeline stages send each other: the parameters' dtype, which null means."""
    autocast_enabled: bool = False
    """Run the forward pass inside `torch.autocast` (on GPUs)."""
    autocast_dtype: str | None = None
    """What autocast computes in; null means the parameters' dtype."""
    grad_reduce_in_fp32: bool | None = None
    """Accumulate and reduce gradients in fp32 where parameters have 16 bits; null means `ddp.grad_reduce_in_fp32`."""

    fp8: str | None = None
    """`e4m3`, or `hybrid` (e4m3 forward, e5m2 for gradients): matrix products in FP8; null has none. This and all that
    follows on FP8 and FP4 needs Transformer Engine."""
    fp8_recipe: str = "tensorwise"
    """How FP8 is scaled: `tensorwise` (a scale a tensor, of now), `delayed` (of earlier steps), `blockwise` (Hopper) or
    `mxfp8` (Blackwell)."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers' products in bf16; not with `delayed`."""
    num_layers_at_start_in_bf16: int = 0
    """With that, layers at the start."""
    num_layers_at_end_in_bf16: int = 0
    """With that, layers at the end."""
    fp8_margin: int = 0
    """Powers of two that `delayed` leaves above the largest entry."""
    fp8_amax_history_len: int = 1
    """Steps that `delayed` looks back for the largest entry."""
    fp8_amax_compute_algo: str = "most_recent"
    """Which of them `delayed` takes: `most_recent` or `max`."""
    fp8_wgrad: bool = True
    """Compute the gradients of weights in FP8 too; false in the higher precision."""
    fp8_dot_product_attention: bool = False
    """The scores and values of attention in FP8 too."""
    fp8_multi_head_attention: bool = False
    """The whole of attention in FP8, with its inputs and outputs."""
    fp8_param: bool | None = None
    """Hold the weights of those products in FP8; null means `fp8_param_gather`, which it must agree with."""
    fp8_param_gather: bool = False
    """The same, and gather them in FP8 (`ddp.use_distributed_optimizer`)."""
    reuse_grad_buf_for_mxfp8_param_ag: bool = False
    """Gather MXFP8 parameters in the gradients' buffer, as `mxfp8` with `fp8_param_gather` must."""
    fp4: str | None = None
    """`e2m1`: matrix products in FP4 instead; null has none."""
    fp4_recipe: str = "nvfp4"
    """How FP4 is scaled: `nvfp4` (Blackwell)."""

    loss_scale: float | None = None
    """With `fp16`: a scale of the loss that stays; null finds one, by the four numbers below."""
    initial_loss_scale: float = 2.0**32
    """With `fp16`: the scale that is tried first."""
    min_loss_scale: float = 1.0
    """With `fp16`: the lowest scale."""
    loss_scale_window: float = 1000
    """With `fp16`: steps without an overflow after which the scale is doubled."""
    hysteresis: int = 2
    """With `fp16`: overflows after which it is halved; the step of each is left out."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Take torch's dtypes and short names too: a configuration holds what YAML can say."""
        if name in DTYPE_FIELDS and value is not None:
            spelled = str(value).removeprefix("torch.")
            value = _DTYPES.get(spelled, spelled)
        object.__setattr__(self, name, value)

    @property
    def dtype(self) -> str | None:
        """Torch's name of the parameters' dtype; None for the checkpoint's."""
        for flag, name in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
            if getattr(self, flag):
                return name
        return self.params_dtype

    @property
    def has_fp8_params(self) -> bool:
        """Whether weights are held in FP8."""
        return self.fp8_param_gather if self.fp8_param is None else self.fp8_param


_BF16: dict[str, Any] = {"bf16": True}
_DELAYED: dict[str, Any] = {
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
}


def _tensorwise(layers: int, recipe: str = "tensorwise") -> dict[str, Any]:
    ends: dict[str, Any] = {"num_layers_at_start_in_bf16": layers, "num_layers_at_end_in_bf16": layers}
    return {"fp8": "hybrid", "fp8_recipe": recipe, "first_last_layers_bf16": True} | ends


# Megatron-Bridge also gathers parameters in FP8 (`fp8_param_gather`), which these leave to whoever wants it.
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"fp32": True},
    "bf16_mixed": _BF16,
    "fp16_mixed": {"fp16": True, "grad_reduce_in_fp32": False},
    "bf16_with_fp8_delayed_scaling_mixed": _BF16 | _DELAYED,
    "bf16_with_fp8_current_scaling_mixed": _BF16 | _tensorwise(1),
    "bf16_with_fp8_subchannel_scaling_mixed": _BF16 | {"fp8": "hybrid", "fp8_recipe": "blockwise"},
    "bf16_with_mxfp8_mixed": _BF16 | {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    "bf16_with_nvfp4_mixed": _BF16 | {"fp4": "e2m1", "fp4_recipe": "nvfp4"},
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": _BF16 | _tensorwise(2),
    "nanov2_bf16_with_fp8_current_scaling_mixed": _BF16 | _tensorwise(2, "blockwise"),
}
"""The records that the names stand for; `-` may be written for `_`."""


def precision_record(given: Any) -> MixedPrecisionConfig:
    """The record that `mixed_precision` is, or that its name stands for; null changes nothing. Raises `ConfigError`."""
    if isinstance(given, MixedPrecisionConfig):
        return given
    if given is None:
        return MixedPrecisionConfig()
    fields = PRECISIONS.get(given.replace("-", "_")) if isinstance(given, str) else None
    if fields is None:
        raise ConfigError(_unknown(given))
    return MixedPrecisionConfig(**fields)


def _unknown(given: Any) -> str:
    if not isinstance(given, str):
        return f"mixed_precision={given!r} is neither a name such as bf16_mixed nor a MixedPrecisionConfig"
    near = difflib.get_close_matches(given.replace("-", "_"), PRECISIONS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"mixed_precision={given!r} is not one of: null, {', '.join(PRECISIONS)}{hint} "
        "(or set its fields, such as mixed_precision.bf16=true)"
    )
