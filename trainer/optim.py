"""Megatron-Core's optimizer and learning-rate schedule, from our configuration.

With bf16 parameters the optimizer keeps fp32 masters; with `ddp.use_distributed_optimizer` both they and Adam's
moments are sharded over the data-parallel ranks.

    optimizer = make_optimizer(cfg, model)
    scheduler = make_scheduler(cfg, optimizer)
"""

from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.lr_schedule import schedule_lengths, weight_decays


def make_ddp_config(config: ConfigContainer) -> DistributedDataParallelConfig:
    """Megatron-Core's record of our `ddp` section."""
    ddp = config.ddp
    return DistributedDataParallelConfig(
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        grad_reduce_in_fp32=ddp.grad_reduce_in_fp32,
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        # Ours (`health.py`) looks on all ranks at once; Megatron's would leave the other ranks waiting for one.
        check_for_nan_in_grad=False,
        bucket_size=ddp.bucket_size,
    )


def make_optimizer(config: ConfigContainer, model: list[Any]) -> Any:
    """The optimizer over all chunks of `model`, which are wrapped with DDP. Every rank calls it; it is a collective.

    Also tells the model's configuration how gradients are scaled and finished, which Megatron's schedules ask it.
    """
    model_config = get_model_config(model[0])
    given = config.optimizer
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
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=config.ddp.use_distributed_optimizer,
            overlap_param_gather=config.ddp.overlap_param_gather,
        ),
        model,
    )
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = finalize_model_grads
    if config.ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return optimizer


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
