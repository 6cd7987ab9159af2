"""The configuration of a training run: one plain dataclass a section, one `ConfigContainer` for all.

Every field says what it means and its unit; the names are those that Megatron-Bridge users know. Nothing here
imports Megatron, so a configuration is read and checked before any process group is made (`checks.py`), from
YAML and `section.key=value` overrides (`overrides.py`) or in Python:

    cfg = ConfigContainer()
    cfg.model.hf_path = "path/to/hf"
    cfg.train.train_iters = 10
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is laid out over the ranks. A provider of `AutoBridge` may stand in its place."""

    hf_path: str = ""
    """Folder of the Hugging Face checkpoint (or its hub id) that training starts from."""
    load_weights: bool = True
    """Start from the checkpoint's weights; false takes its configuration alone and draws weights by `rng.seed`."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, in stages (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks a pipeline rank holds (VPP), for the interleaved schedule; null means one and plain 1F1B."""
    sequence_parallel: bool = False
    """Split the activations between the matrices along the sequence over the TP ranks."""
    calculate_per_token_loss: bool = True
    """Average the loss over all unmasked tokens of the global batch, so that it does not depend on the layout;
    false averages micro-batch means, as Megatron-Core does by default."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """How much is trained."""

    micro_batch_size: int = 1
    """Samples that go through the model at once on a rank."""
    global_batch_size: int = 8
    """Samples of one optimizer step, over all data-parallel ranks and micro-batches."""
    train_iters: int = 10
    """Optimizer steps of the whole run, those before a resume included."""


@dataclass(slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, Megatron-Core's own. With bf16 parameters it keeps fp32 masters."""

    optimizer: str = "adam"
    """`adam`, with decoupled weight decay (AdamW)."""
    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 clips nothing."""


@dataclass(slots=True, kw_only=True)
class SchedulerConfig:
    """The learning rate over the steps."""

    lr_decay_style: str = "cosine"
    """`constant`, `linear`, `cosine` or `inverse-square-root`."""
    lr_decay_iters: int | None = None
    """Step at which `min_lr` is reached; null means `train.train_iters`."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up before the decay. The first of them has the rate `lr_warmup_init`."""
    lr_warmup_init: float = 0.0
    """Learning rate at which the warm-up starts."""


@dataclass(slots=True, kw_only=True)
class DistributedDataParallelConfig:
    """Megatron-Core's gradient buffers and their reduction over the data-parallel ranks."""

    use_distributed_optimizer: bool = True
    """Shard the optimizer's state and step over the data-parallel ranks."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32 when the parameters are bf16."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on (useful on GPUs)."""
    overlap_param_gather: bool = False
    """Gather parameters while the next forward pass goes on; needs the two settings above it."""
    check_for_nan_in_grad: bool = True
    """Stop with an error on a NaN or infinite gradient, before it is reduced."""
    bucket_size: int | None = None
    """Parameters in one reduction bucket; null lets Megatron-Core choose."""


@dataclass(slots=True, kw_only=True)
class DatasetConfig:
    """The text, as one packed stream of tokens (`data/packing.py`)."""

    files: list[str] = field(default_factory=list)
    """Text files to train on, one document a file, in this order; empty means Python's own standard library."""
    seq_length: int = 128
    """Tokens of a sample."""
    max_bytes: int = 4_000_000
    """Bytes of text that the default (no `files`) takes at most; files that are named are taken whole."""
    cache_dir: str | None = None
    """Folder of tokenized streams, which are made once; null means `~/.cache/weightcast/tokens`."""


@dataclass(slots=True, kw_only=True)
class TokenizerConfig:
    """How text becomes tokens."""

    tokenizer_model: str | None = None
    """Folder (or hub id) of a Hugging Face tokenizer; null means `model.hf_path`."""
    vocab_size: int | None = None
    """Entries that the model has room for, when known; a tokenizer with a higher token id is refused."""


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming (`checkpoint.py`), and the Hugging Face folder at the end."""

    save: str | None = None
    """Folder that training checkpoints are saved into; null saves none."""
    save_interval: int | None = None
    """Steps between two checkpoints; null saves one, after the last step."""
    most_recent_k: int = 2
    """Newest checkpoints that are kept; older ones are removed after a new one is whole."""
    load: str | None = None
    """Folder to resume from. If it is also `save` and holds nothing yet, training starts afresh."""
    export_hf: str | None = None
    """Folder that the trained model is written into as a Hugging Face checkpoint, after the last step."""


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """What a run tells."""

    log_interval: int = 1
    """Steps between two log lines (rank 0, `logging` level INFO)."""
    events: str | None = None
    """File of JSON lines, one a phase and version (`events.py`); each rank appends to `<events>.<rank>`."""


@dataclass(slots=True, kw_only=True)
class RNGConfig:
    """Where chance comes from."""

    seed: int = 1234
    """Seeds the order of the samples, new weights, and dropout."""


@dataclass(slots=True, kw_only=True)
class DistributedInitConfig:
    """The process groups."""

    distributed_timeout_minutes: float = 10
    """Minutes that a collective waits for the other ranks before it fails."""


@dataclass(slots=True, kw_only=True)
class PublishConfig:
    """Streaming versions to inference engines while training."""

    to: str | None = None
    """Address that rank 0 binds, such as `tcp://127.0.0.1:5600` or `ipc:///tmp/weights`; null publishes nothing."""
    every: int = 1
    """Steps between two versions. A version's number is its step."""
    wait_for: int = 0
    """Engines that must be connected before the first step."""
    wait_timeout_s: float = 600.0
    """Seconds to wait for them."""
    timeout_s: float = 600.0
    """Seconds that one version may take until the fleet serves it."""
    overlap: bool = False
    """Train on as soon as a version is packed, while engines fetch and load it. Its report, and its failure, come with
    the next version or at the end of the run; otherwise each step waits until the fleet serves."""
    delta: str = "auto"
    """Whether engines that have an earlier version are sent only what changed: `on`, `off`, `zstd` (compressed as well,
    for links below 1 Gb/s), or `auto`, which decides by measurement."""
    report_log: str | None = None
    """File of JSON lines that rank 0 appends each version's report to, for `weightcast trace`; null keeps none."""
    metrics_port: int | None = None
    """Port on which rank 0 answers Prometheus at `/metrics` (0: a free one, which is logged); null answers nobody."""
    metrics_host: str = "127.0.0.1"
    """Address of this machine for `metrics_port`. Whoever reaches it may read the metrics."""
    quantize: str = "none"
    """`none`; `fp8_block` (FP8 with a scale for each 128 x 128, as DeepSeek's and Qwen's checkpoints); or `fp8_tensor`
    (one scale a matrix): what vLLM would make of the weights itself, made here, at half the bytes."""
    modules_to_not_convert: list[str] = field(default_factory=list)
    """Modules to publish as they are besides embeddings, norms, routers and output layers: names, parts of them in
    whole words, or patterns with `*`."""
    engine_config: str | None = None
    """File for what an engine must be told to read FP8, as JSON for its `--hf-overrides` or `config.json`."""


def delta_mode(publish: PublishConfig) -> str:
    """`publish.delta` as `WeightPublisher` takes it: YAML reads a bare `on` or `off` as true or false."""
    return {"True": "on", "False": "off"}.get(str(publish.delta), str(publish.delta))


@dataclass(slots=True, kw_only=True)
class ConfigContainer:
    """All sections of a run. `model` is a `ModelConfig` or a finalised provider of `AutoBridge`."""

    model: Any = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)
    dist: DistributedInitConfig = field(default_factory=DistributedInitConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    mixed_precision: str | None = None
    """`bf16_mixed` (bf16 weights, fp32 masters), `fp32`, or null for what the checkpoint's dtype says."""
