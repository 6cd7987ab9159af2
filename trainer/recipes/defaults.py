"""What recipes have in common; each changes what is its own. The figures are those of Megatron-Bridge's recipes.

cfg = pretrain_defaults()
cfg.train.global_batch_size = 512

Every recipe starts as it is, on mock data: none names records that would have to be downloaded. A fine-tuning recipe
reads records, packed, once there are any:

cfg = sft_defaults()
train_on_records(cfg)
cfg.dataset.files = ["train.jsonl"]
"""

from weightcast.trainer.config import CommOverlapConfig, ConfigContainer


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
    cfg.comm_overlap = CommOverlapConfig()
    cfg.dataset.kind = "mock"
    cfg.dataset.seq_length = 4096
    cfg.checkpoint.save_interval = 500
    cfg.rng.seed = 1234
    cfg.mixed_precision = "bf16_mixed"
    return cfg


def sft_defaults() -> ConfigContainer:
    """Supervised fine-tuning of all weights: 1000 steps of 128 samples, from 5e-6 to 0; see `train_on_records`."""
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


def peft_defaults(scheme: str = "lora") -> ConfigContainer:
    """Adapters of rank 32 on all of attention and MLP of a frozen base, from 1e-4 to 0; else as `sft_defaults`.

    `scheme` is `lora`, `canonical_lora`, `dora` or one of your own (`PeftConfig.scheme`). Targets and alpha (32; 64 for
    DoRA) are left to the scheme, so that they are right for `peft.scheme=dora` on the command line too.
    """
    cfg = sft_defaults()
    cfg.optimizer.lr = 1e-4
    cfg.peft.scheme = scheme
    cfg.peft.dim = 32
    return cfg


def train_on_records(cfg: ConfigContainer) -> None:
    """Make a fine-tuning recipe read the records of `cfg.dataset.files` or `dataset_name`, packed where the run can.

    `recipe=llama32_1b.sft dataset.files=[train.jsonl]` does it by itself (`run_words.py`).
    """
    cfg.dataset.kind = "sft"
    cfg.dataset.packed_sequence = can_pack(cfg)


def can_pack(cfg: ConfigContainer) -> bool:
    """Whether the model and the layout take packed sequences. `cfg.model` is a `ModelConfig`."""
    is_whole = cfg.train.micro_batch_size == 1 and cfg.model.context_parallel_size == 1
    return is_whole and "vision_config" not in cfg.model.hf_config
