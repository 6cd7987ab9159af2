"""Whether the fields of `mixed_precision` fit each other; what the machine can compute is asked when they are applied.

check_precision(config)
"""

from collections.abc import Iterable
from dataclasses import fields

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer, MixedPrecisionConfig
from weightcast.trainer.config.precision import DTYPE_FIELDS, precision_record

DTYPES = (None, "float32", "bfloat16", "float16")
FLAGS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FP8_FORMATS = (None, "e4m3", "hybrid")
FP8_RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
OF_FP8 = tuple(
    item.name
    for item in fields(MixedPrecisionConfig)
    # What `fp8_param` says, `fp8_param_gather` says too.
    if item.name.startswith(("fp8_", "first_last", "num_layers")) and item.name != "fp8_param"
)
LOSS_SCALING = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")


def check_precision(config: ConfigContainer) -> None:
    """Name or record are known, and no field contradicts another or has no effect."""
    record = precision_record(config.mixed_precision)
    _check_dtypes(record)
    _check_quantised(record)
    _check_parameters(record, config.ddp.use_distributed_optimizer)
    _check_loss_scaling(record)


def _check_dtypes(record: MixedPrecisionConfig) -> None:
    for name in DTYPE_FIELDS:
        check_choice(f"mixed_precision.{name}", getattr(record, name), DTYPES)
    flags = [name for name in FLAGS if getattr(record, name)]
    if len(flags) > 1:
        raise ConfigError(
            f"mixed_precision.{flags[0]} and mixed_precision.{flags[1]} are both true: set one of them to false"
        )
    if flags and record.params_dtype not in (None, FLAGS[flags[0]]):
        raise ConfigError(
            f"mixed_precision.params_dtype={record.params_dtype} contradicts mixed_precision.{flags[0]}=true: leave it "
            "out, or set the other"
        )
    if record.pipeline_dtype is not None and record.pipeline_dtype != record.dtype:
        raise ConfigError(
            f"mixed_precision.pipeline_dtype={record.pipeline_dtype}, and what stages send has the parameters' dtype, "
            f"{record.dtype or 'which nothing here says'}: leave it out, or set both alike"
        )
    if record.autocast_dtype is not None and not record.autocast_enabled:
        raise ConfigError(
            "mixed_precision.autocast_dtype is set and mixed_precision.autocast_enabled is not: set it to true, or "
            "leave the dtype out"
        )


def _check_quantised(record: MixedPrecisionConfig) -> None:
    check_choice("mixed_precision.fp8", record.fp8, FP8_FORMATS)
    check_choice("mixed_precision.fp8_recipe", record.fp8_recipe, FP8_RECIPES)
    check_choice("mixed_precision.fp8_amax_compute_algo", record.fp8_amax_compute_algo, ("most_recent", "max"))
    check_choice("mixed_precision.fp4", record.fp4, (None, "e2m1"))
    check_choice("mixed_precision.fp4_recipe", record.fp4_recipe, ("nvfp4",))
    if record.fp8 is not None and record.fp4 is not None:
        raise ConfigError("mixed_precision.fp8 and mixed_precision.fp4 are both set: keep one of them")
    if (record.fp8 or record.fp4) and record.dtype == "float32":
        raise ConfigError(
            "mixed_precision.fp8 and fp4 are products of 16-bit weights, and these are fp32: set mixed_precision.bf16="
            "true and fp32=false"
        )
    if record.fp8 is None:
        _refuse_without(record, "fp8", OF_FP8)
    check_positive({"mixed_precision.fp8_amax_history_len": record.fp8_amax_history_len})
    ends = (record.num_layers_at_start_in_bf16, record.num_layers_at_end_in_bf16)
    if min(ends) < 0 or (any(ends) and not record.first_last_layers_bf16):
        raise ConfigError(
            f"mixed_precision.num_layers_at_start_in_bf16={ends[0]} and num_layers_at_end_in_bf16={ends[1]} are "
            "numbers of layers, 0 or more, for mixed_precision.first_last_layers_bf16=true"
        )
    if record.first_last_layers_bf16 and record.fp8_recipe == "delayed":
        raise ConfigError(
            "mixed_precision.first_last_layers_bf16 is not for mixed_precision.fp8_recipe=delayed: set it to false, or "
            "the recipe to tensorwise"
        )


def _check_parameters(record: MixedPrecisionConfig, distributed_optimizer: bool) -> None:
    if record.fp8_param is not None and record.fp8_param != record.fp8_param_gather:
        raise ConfigError(
            f"mixed_precision.fp8_param={str(record.fp8_param).lower()} contradicts mixed_precision.fp8_param_gather="
            f"{str(record.fp8_param_gather).lower()}: set both alike"
        )
    if record.has_fp8_params and not distributed_optimizer:
        raise ConfigError("mixed_precision.fp8_param_gather needs ddp.use_distributed_optimizer=true")
    reuses = record.reuse_grad_buf_for_mxfp8_param_ag
    if reuses != (record.has_fp8_params and record.fp8_recipe == "mxfp8"):
        raise ConfigError(
            f"mixed_precision.reuse_grad_buf_for_mxfp8_param_ag={str(reuses).lower()}: it is true with "
            "fp8_recipe=mxfp8 and fp8_param_gather=true, and false otherwise"
        )


def _check_loss_scaling(record: MixedPrecisionConfig) -> None:
    if record.dtype != "float16":
        _refuse_without(record, "fp16", LOSS_SCALING)
    check_positive({f"mixed_precision.{name}": getattr(record, name) for name in LOSS_SCALING})
    if record.initial_loss_scale < record.min_loss_scale:
        raise ConfigError(
            f"mixed_precision.initial_loss_scale={record.initial_loss_scale:g} is below mixed_precision.min_loss_scale="
            f"{record.min_loss_scale:g}: raise it"
        )


def _refuse_without(record: MixedPrecisionConfig, wanted: str, names: Iterable[str]) -> None:
    """None of `names` is set, since without `wanted` they have no effect."""
    default = MixedPrecisionConfig()
    for name in names:
        if getattr(record, name) not in (getattr(default, name), None):
            raise ConfigError(
                f"mixed_precision.{name} is for mixed_precision.{wanted}, which is not set: set it, or leave {name} out"
            )
