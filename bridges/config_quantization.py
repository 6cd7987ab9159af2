"""Which quantised checkpoints are read: those that a codec of `codecs` decodes. All others are refused by name."""

from typing import Any

from transformers import PretrainedConfig

from weightcast.bridges.codecs import BLOCK
from weightcast.bridges.config_refusals import refuse

FIELD = "quantization_config"


def require_readable_weights(hf: PretrainedConfig) -> None:
    """Refuse quantised weights other than FP8 (e4m3) with a factor for each block of 128 x 128.

    Those are decoded as they are read; the model, and exports of it, have the weights that they stand for.
    """
    settings: Any = getattr(hf, FIELD, None)
    if settings is None:
        return
    fields = settings if isinstance(settings, dict) else settings.to_dict()
    blocks = fields.get("weight_block_size")
    kind = (fields.get("quant_method"), fields.get("fmt", "e4m3"), list(blocks) if blocks else None)
    if kind == ("fp8", "e4m3", [BLOCK, BLOCK]):
        return
    why = f"of quantised weights only FP8 e4m3 with weight_block_size [{BLOCK}, {BLOCK}] is read"
    refuse(hf, FIELD, fields, why, "convert the checkpoint to bf16 first")
