"""Megatron-Core's optimizer and learning-rate schedule, from our configuration.

With 16-bit parameters the optimizer keeps fp32 masters; with `ddp.use_distributed_optimizer` both they and Adam's
moments are sharded over the data-parallel ranks.

    optimizer = make_optimizer(cfg, model)
    scheduler = make_scheduler(cfg, optimizer)
"""

from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.config.comm_overlap import overlap_record
from weightcast.trainer.config.precision import precision_record
from weightcast.trainer.data_parallel import data_parallel_settings
from weightcast.trainer.lr_schedule import schedule_lengths, weight_decays
from weightcast.trainer.optimizer_parts import fuse_adams


def make_ddp_config(config: ConfigContainer, provider: Any) -> DistributedDataParallelConfig:
    """Megatron-Core's record of `ddp` and of what `comm_overlap` and `mixed_precision` say of it.

    `provider` is finalised. Needs torch's process group.
    """
    model_ranks = provider.tensor_model_parallel_size * provider.pipeline_model_parallel_size
    interleaved = provider.virtual_pipeline_model_parallel_size is not None
    replicas = dist.get_world_size() // model_ranks
    settings = data_parallel_settings(config, replicas=replicas, interleaved=interleaved)
    precision = precision_record(config.mixed_precision)
    return DistributedDataParallelConfig(
        use_distributed_optimizer=config.ddp.use_distributed_optimizer,
        grad_reduce_in_fp32=settings.grad_reduce_in_fp32,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        align_param_gather=settings.align_param_gather,
        # Ours (`health.py`) looks on all ranks at once; Megatron's would leave the other ranks waiting for one.
        check_for_nan_in_grad=False,
        bucket_size=settings.bucket_size,
        fp8_param_gather=precision.has_fp8_params,
        reuse_grad_buf_for_mxfp8_param_ag=precision.reuse_grad_buf_for_mxfp8_param_ag,
        delay_wgrad_compute=provider.delay_wgrad_compute,
    )


def make_optimizer(config: ConfigContainer, model: list[Any]) -> Any:
    """The optimizer over all chunks of `model`, which are wrapped with DDP. Every rank calls it; it is a collective.

    Also tells the model's configuration how gradients are scaled and finished, which Megatron's schedules ask it.
    """
    model_config, ddp = get_model_config(model[0]), model[0].ddp_config
    given, precision = config.optimizer, precision_record(config.mixed_precision)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=given.optimizer,
            lr=given.lr,
            min_lr=given.min_lr,
            weight_decay=given.weight_decay,
            adam_beta1=given.adam_beta1,
            adam_beta2=given.adam_beta2,
            adam_eps=given.adam_eps,
            clip_grad=given.clip_grad,
            bf16=model_config.bf16,
            fp16=model_config.fp16,
            params_dtype=model_config.params_dtype,
            fp8_recipe=model_config.fp8_recipe if model_config.fp8 else None,
            reuse_grad_buf_for_mxfp8_param_ag=ddp.reuse_grad_buf_for_mxfp8_param_ag,
            loss_scale=precision.loss_scale,
            initial_loss_scale=precision.initial_loss_scale,
            min_loss_scale=precision.min_loss_scale,
            loss_scale_window=precision.loss_scale_window,
            hysteresis=precision.hysteresis,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
            overlap_param_gather_with_optimizer_step=bool(
                overlap_record(config.comm_overlap).overlap_param_gather_with_optimizer_step
            ),
        ),
        model,
    )
    fuse_adams(optimizer)
    _tell_schedules(model_config, ddp, optimizer, model)
    return optimizer


def _tell_schedules(model_config: Any, ddp: DistributedDataParallelConfig, optimizer: Any, model: list[Any]) -> None:
    """What Megatron's schedules ask the model's configuration for."""
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if ddp.align_param_gather:
        model_config.param_sync_func = [chunk.start_param_sync for chunk in model]


def make_scheduler(config: ConfigContainer, optimizer: Any) -> Any:
    """The learning rate and weight decay by samples; `step(global_batch_size)` after each optimizer step."""
    lengths = schedule_lengths(config)
    start, end = weight_decays(config)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.scheduler.lr_warmup_init,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=lengths.warmup_samples,
        lr_decay_steps=lengths.decay_samples,
        lr_decay_style=config.scheduler.lr_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=lengths.weight_decay_samples,
        wd_incr_style=config.scheduler.weight_decay_incr_style,
        wsd_decay_steps=lengths.wsd_decay_samples,
        lr_wsd_decay_style=config.scheduler.lr_wsd_decay_style,
    )
