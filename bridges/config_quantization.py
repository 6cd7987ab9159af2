"""Which quantised checkpoints are read: those that a codec of `codecs` decodes. All others are refused by name."""

from typing import Any

import torch
from transformers import PretrainedConfig

from weightcast.bridges.codecs_fp8 import BLOCK
from weightcast.bridges.config_refusals import refuse

FIELD = "quantization_config"


def require_readable_weights(hf: PretrainedConfig) -> None:
    """Refuse quantised weights other than MXFP4, and FP8 (e4m3) with a factor for each block of 128 x 128.

    Those are decoded as they are read; the model, and exports of it, have the weights that they stand for.
    """
    settings: Any = getattr(hf, FIELD, None)
    if settings is None:
        return
    fields = settings if isinstance(settings, dict) else settings.to_dict()
    blocks = fields.get("weight_block_size")
    kind = (fields.get("quant_method"), fields.get("fmt", "e4m3"), list(blocks) if blocks else None)
    if kind[0] == "mxfp4" or kind == ("fp8", "e4m3", [BLOCK, BLOCK]):
        return
    why = f"of quantised weights only MXFP4 and FP8 e4m3 with weight_block_size [{BLOCK}, {BLOCK}] are read"
    refuse(hf, FIELD, fields, why, "convert the checkpoint to bf16 first")


def unnamed_dtype(hf: PretrainedConfig) -> torch.dtype:
    """The dtype of weights whose configuration does not say: bf16 for quantised ones, as in transformers, or fp32."""
    return torch.float32 if getattr(hf, FIELD, None) is None else torch.bfloat16
