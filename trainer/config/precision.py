"""The names that `mixed_precision` may have, which are Megatron-Bridge's, and what each sets on the provider.

PRECISIONS["bf16_with_fp8_current_scaling_mixed"].settings
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Precision:
    """What weights are held and computed in."""

    dtype: str
    """Torch's name of the parameters' dtype; with 16 bits the optimizer keeps fp32 masters."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Megatron-Core's settings of matrix products in 8 or 4 bits, for which Transformer Engine is needed."""


_FIRST_AND_LAST = {
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}
_DELAYED = {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision("float32"),
    "bf16_mixed": Precision("bfloat16"),
    "bf16_with_fp8_delayed_scaling_mixed": Precision("bfloat16", _DELAYED),
    "bf16_with_fp8_current_scaling_mixed": Precision(
        "bfloat16", {"fp8": "hybrid", "fp8_recipe": "tensorwise"} | _FIRST_AND_LAST
    ),
    "bf16_with_fp8_subchannel_scaling_mixed": Precision("bfloat16", {"fp8": "hybrid", "fp8_recipe": "blockwise"}),
    "bf16_with_mxfp8_mixed": Precision("bfloat16", {"fp8": "hybrid", "fp8_recipe": "mxfp8"}),
    "bf16_with_nvfp4_mixed": Precision("bfloat16", {"fp4": "e2m1", "fp4_recipe": "nvfp4"}),
}
