"""Whether what `comm_overlap` asks for fits the layout, the model and `ddp`.

What Transformer Engine is needed for is asked when it is applied (`trainer/comm_overlap.py`).

check_overlap(config, layout)
"""

import difflib
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.checks.layout import Layout
from weightcast.trainer.config import CommOverlapConfig, ConfigContainer
from weightcast.trainer.config.comm_overlap import overlap_record
from weightcast.trainer.config.precision import precision_record
from weightcast.trainer.data_parallel import data_parallel_settings

BACKENDS = (None, "nccl", "mpi", "gloo")
# The products that Transformer Engine has buffers for.
PRODUCTS = tuple(f"{linear}_{what}" for linear in ("qkv", "proj", "fc1", "fc2") for what in ("fprop", "dgrad", "wgrad"))


def check_overlap(config: ConfigContainer, layout: Layout) -> None:
    """Nothing is asked to overlap that does not travel, or that something else forbids."""
    record = overlap_record(config.comm_overlap)
    _check_tensor(record, config.model)
    _check_pipeline(record, config.model)
    _check_data(config, record, layout)
    _check_experts(config, record)


def _check_tensor(record: CommOverlapConfig, model: Any) -> None:
    check_choice("comm_overlap.tp_comm_bootstrap_backend", record.tp_comm_bootstrap_backend, BACKENDS)
    for name in record.tp_comm_overlap_cfg:
        if name not in PRODUCTS:
            near = difflib.get_close_matches(str(name), PRODUCTS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"comm_overlap.tp_comm_overlap_cfg has no product {name!r}; {hint}there are {', '.join(PRODUCTS)}"
            )
    if not record.tp_comm_overlap:
        for name in ("tp_comm_overlap_cfg", "tp_comm_bootstrap_backend"):
            if getattr(record, name):
                raise ConfigError(
                    f"comm_overlap.{name} is set and comm_overlap.tp_comm_overlap is not: set it to true, or leave "
                    f"{name} out"
                )
        return
    if model.tensor_model_parallel_size < 2:
        raise ConfigError(
            "comm_overlap.tp_comm_overlap needs model.tensor_model_parallel_size of 2 or more: raise it, or set "
            "comm_overlap.tp_comm_overlap=false"
        )
    if not model.sequence_parallel:
        raise ConfigError(
            "comm_overlap.tp_comm_overlap needs model.sequence_parallel=true, whose gathering and scattering it hides: "
            "set it, or comm_overlap.tp_comm_overlap=false"
        )


def _check_pipeline(record: CommOverlapConfig, model: Any) -> None:
    stages, interleaved = model.pipeline_model_parallel_size, _is_interleaved(model)
    for name in ("overlap_p2p_comm", "batch_p2p_comm"):
        if getattr(record, name) and stages == 1:
            raise ConfigError(
                f"comm_overlap.{name} is about pipeline stages, and there is one: leave it out, or raise "
                "model.pipeline_model_parallel_size"
            )
    # Megatron's plain 1F1B cannot overlap, and its interleaved schedule mixes up what it sends without.
    if stages > 1 and record.overlap_p2p_comm not in (None, interleaved):
        raise ConfigError(
            f"comm_overlap.overlap_p2p_comm={str(record.overlap_p2p_comm).lower()}: interleaved stages "
            "(model.virtual_pipeline_model_parallel_size) always overlap and others never do: leave it out"
        )
    if record.batch_p2p_comm and interleaved:
        raise ConfigError("comm_overlap.batch_p2p_comm is not for interleaved stages, which overlap: leave it out")
    if record.wgrad_deferral_limit < 0:
        raise ConfigError(f"comm_overlap.wgrad_deferral_limit={record.wgrad_deferral_limit}: use 0 for all, or more")
    if record.wgrad_deferral_limit and not record.defer_embedding_wgrad_compute:
        raise ConfigError(
            "comm_overlap.wgrad_deferral_limit is set and comm_overlap.defer_embedding_wgrad_compute is not: set it to "
            "true"
        )
    if record.defer_embedding_wgrad_compute and stages == 1:
        raise ConfigError(
            "comm_overlap.defer_embedding_wgrad_compute needs model.pipeline_model_parallel_size of 2 or more: with "
            "one stage no rank waits"
        )


def _check_data(config: ConfigContainer, record: CommOverlapConfig, layout: Layout) -> None:
    model = config.model
    interleaved = _is_interleaved(model)
    replicas = layout.data_parallel_size * model.context_parallel_size
    found = data_parallel_settings(config, replicas=replicas, interleaved=interleaved)
    check_positive({"comm_overlap.bucket_size": record.bucket_size, "ddp.bucket_size": config.ddp.bucket_size})
    if found.overlap_param_gather and not (found.overlap_grad_reduce and config.ddp.use_distributed_optimizer):
        raise ConfigError(
            "overlap_param_gather (ddp, comm_overlap) needs ddp.overlap_grad_reduce=true and "
            "ddp.use_distributed_optimizer=true"
        )
    for name in ("overlap_param_gather_with_optimizer_step", "align_param_gather"):
        if getattr(found, name) and not (found.overlap_param_gather and interleaved):
            raise ConfigError(
                f"comm_overlap.{name} needs overlap_param_gather=true and interleaved stages "
                "(model.virtual_pipeline_model_parallel_size): set them, or leave it out"
            )
    checkpoint = config.checkpoint
    if found.overlap_param_gather_with_optimizer_step and (checkpoint.save or checkpoint.load):
        # Megatron-LM refuses its distributed checkpoints with it: the optimizer is in parts that they do not name.
        raise ConfigError(
            "comm_overlap.overlap_param_gather_with_optimizer_step cannot be saved or resumed: leave it out, or "
            "checkpoint.save and checkpoint.load"
        )


def _check_experts(config: ConfigContainer, record: CommOverlapConfig) -> None:
    if record.delay_wgrad_compute and not record.overlap_moe_expert_parallel_comm:
        raise ConfigError(
            "comm_overlap.delay_wgrad_compute makes work for comm_overlap.overlap_moe_expert_parallel_comm to hide "
            "behind: set that to true too, or leave it out"
        )
    if not record.overlap_moe_expert_parallel_comm:
        return
    model, name = config.model, "comm_overlap.overlap_moe_expert_parallel_comm"
    # As in megatron/core/transformer/transformer_config.py.
    wanting = (
        (model.expert_model_parallel_size < 2, "model.expert_model_parallel_size of 2 or more"),
        (
            model.pipeline_model_parallel_size > 1 and not _is_interleaved(model),
            "model.virtual_pipeline_model_parallel_size where there are pipeline stages",
        ),
        (model.moe_token_dispatcher_type == "allgather", "model.moe_token_dispatcher_type=alltoall or flex"),
        (model.recompute_granularity == "full", "model.recompute_granularity=selective or null"),
        (bool(model.moe_shared_expert_overlap), "model.moe_shared_expert_overlap=false"),
        (precision_record(config.mixed_precision).dtype == "float32", "16-bit weights, mixed_precision=bf16_mixed"),
        (config.dataset.packed_sequence, "dataset.packed_sequence=false"),
    )
    for is_wanting, remedy in wanting:
        if is_wanting:
            raise ConfigError(f"{name} needs {remedy}: set it, or {name}=false")


def _is_interleaved(model: Any) -> bool:
    """Whether ranks hold several chunks, as far as the settings say: a list of stages may say it too."""
    return model.virtual_pipeline_model_parallel_size is not None or model.pipeline_model_parallel_layout is not None
