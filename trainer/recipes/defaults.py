"""What recipes have in common; each changes what is its own. The figures are those of Megatron-Bridge's recipes.

cfg = pretrain_defaults()
cfg.train.global_batch_size = 512
"""

from weightcast.trainer.config import ConfigContainer


def pretrain_defaults() -> ConfigContainer:
    """Pretraining in bf16 on mock data: Adam, 500 steps of warm-up, then a cosine from 3e-4 to 3e-5.

    The schedule has its own length, so that a run cut short by `train.train_iters` has the rates of a whole one.
    """
    cfg = ConfigContainer()
    cfg.train.train_iters = 300_000
    cfg.train.global_batch_size = 32
    cfg.train.micro_batch_size = 2
    cfg.optimizer.lr = 3e-4
    cfg.optimizer.min_lr = 3e-5
    cfg.optimizer.weight_decay = 0.1
    cfg.optimizer.adam_beta1 = 0.9
    cfg.optimizer.adam_beta2 = 0.95
    cfg.optimizer.adam_eps = 1e-8
    cfg.optimizer.clip_grad = 1.0
    cfg.scheduler.lr_decay_style = "cosine"
    cfg.scheduler.lr_warmup_iters = 500
    cfg.scheduler.lr_decay_iters = cfg.train.train_iters
    cfg.ddp.use_distributed_optimizer = True
    cfg.ddp.grad_reduce_in_fp32 = True
    cfg.ddp.overlap_grad_reduce = True
    cfg.ddp.overlap_param_gather = True
    cfg.dataset.kind = "mock"
    cfg.dataset.seq_length = 4096
    cfg.checkpoint.save_interval = 500
    cfg.rng.seed = 1234
    cfg.mixed_precision = "bf16_mixed"
    return cfg


def sft_defaults() -> ConfigContainer:
    """Supervised fine-tuning of all weights: 1000 steps of 128 samples, from 5e-6 to 0, on mock data until told of any.

    `cfg.dataset.kind = "sft"` with `cfg.dataset.files` trains on answers to prompts.
    """
    cfg = pretrain_defaults()
    cfg.train.train_iters = 1000
    cfg.train.global_batch_size = 128
    cfg.train.micro_batch_size = 1
    cfg.optimizer.lr = 5e-6
    cfg.optimizer.min_lr = 0.0
    cfg.optimizer.adam_beta2 = 0.98
    cfg.scheduler.lr_warmup_iters = 50
    cfg.scheduler.lr_decay_iters = cfg.train.train_iters
    cfg.dataset.seq_length = 2048
    cfg.rng.seed = 5678
    return cfg
