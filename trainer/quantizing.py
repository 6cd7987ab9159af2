"""FP8 from a training run: `publish.quantize`, with the one reduction that some layouts need.

source = quantize_source(bridge.weight_source(model), cfg.publish, bridge.hf_config)
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weightcast.sync import WeightSource
from weightcast.sync.quantize_rules import Fp8Scheme, kept_by_config
from weightcast.sync.quantized_source import QuantizedSource
from weightcast.trainer.config import PublishConfig

logger = logging.getLogger(__name__)

QUANTIZE_NOTHING = "none"


def quantize_source(source: WeightSource, publish: PublishConfig, hf_config: Any) -> WeightSource:
    """`source` as it is published: itself, or a `QuantizedSource` over it. Every rank calls it.

    What the model's own `quantization_config` leaves alone is left alone here too. Rank 0 writes what the engine must
    be told into `publish.engine_config`. Raises `ConfigError` for a model that the rules do not know.
    """
    if publish.quantize == QUANTIZE_NOTHING:
        return source
    keep = kept_by_config(getattr(hf_config, "quantization_config", None) or {}, source.specs())
    scheme = Fp8Scheme(kind=publish.quantize, keep=(*keep, *publish.modules_to_not_convert))
    quantized = QuantizedSource(source, scheme, reduce_amax=reduce_amax if source.world_size > 1 else None)
    if source.rank == 0:
        told = json.dumps(quantized.engine_config())
        if publish.engine_config is not None:
            Path(publish.engine_config).write_text(told + "\n")
        logger.info("publishing %s; the engine needs --hf-overrides '%s'", publish.quantize, told)
    return quantized


def reduce_amax(values: torch.Tensor) -> None:
    """Replace `values`, in host memory, by their elementwise maximum over all ranks of the job."""
    if "nccl" in dist.get_backend() and "gloo" not in dist.get_backend():
        on_device = values.cuda()
        dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
        values.copy_(on_device)
    else:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
