"""Which model is trained, and how it lies over the ranks.

cfg.model.hf_path = "path/to/hf"
cfg.model.tensor_model_parallel_size = 2

Settings that are null are what the model's own configuration says. Those that Megatron-Core knows have its names and
its meaning, and are set on the provider one by one.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is laid out over the ranks. A provider of `AutoBridge` may stand in its place."""

    hf_path: str = ""
    """Folder of the Hugging Face checkpoint (or its hub id) that training starts from; wins over `hf_config`."""
    hf_config: dict[str, Any] = field(default_factory=dict)
    """Fields of a Hugging Face `config.json`, for a model without a checkpoint; `rng.seed` draws its weights."""
    load_weights: bool = True
    """Start from the weights of `hf_path`; false takes its configuration alone and draws weights by `rng.seed`."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, in stages (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks a pipeline rank holds (VPP), for the interleaved schedule; null means one and plain 1F1B."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, two chunks each, one from either end of it (CP)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer (EP); the ranks are those of data, context and tensor parallelism."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices (ETP); null means as many as `tensor_model_parallel_size`."""
    sequence_parallel: bool = False
    """Split the activations between the matrices along the sequence over the TP ranks."""
    pipeline_model_parallel_layout: Any = None
    """What each (virtual) stage holds, as Megatron writes it: `Et*3|t*4|t*4|t*3L`, or a list of lists such as
    `[[embedding, decoder], [decoder, loss]]`; null cuts the layers evenly."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, where they do not divide evenly."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, where they do not divide evenly."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when the layers are divided, so that the first stage has one layer fewer."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer as a layer when the layers are divided, so that the last stage has one layer fewer."""

    compiled_kernels: bool | None = None
    """Fuse elementwise work by torch.compile; null fuses it for weights of 16 bits on a GPU without Transformer Engine,
    where there are Triton and a C compiler. The first step then compiles for some seconds."""
    recompute_granularity: str | None = None
    """What is computed again in the backward pass instead of being kept: `full` (layers) or `selective` (parts)."""
    recompute_method: str | None = None
    """With `full`: `uniform` (groups of `recompute_num_layers` layers) or `block` (the first that many of a stage)."""
    recompute_num_layers: int | None = None
    """Layers that `recompute_method` counts by."""
    recompute_modules: list[str] | None = None
    """With `selective`: which parts, such as `[core_attn, mlp, moe]`; null means `[core_attn]`."""

    moe_token_dispatcher_type: str | None = None
    """How tokens travel to their experts: `alltoall`, `allgather`, or `flex` (DeepEP, on GPUs)."""
    moe_grouped_gemm: bool | None = None
    """Multiply all experts of a rank in one kernel (Transformer Engine), not one by one."""
    moe_permute_fusion: bool | None = None
    """Fused kernels for the sorting of tokens by expert (Transformer Engine)."""
    moe_shared_expert_overlap: bool | None = None
    """Compute shared experts while tokens travel (on GPUs, with `alltoall`)."""
    moe_router_load_balancing_type: str | None = None
    """What keeps the experts equally busy: `aux_loss`, `seq_aux_loss`, `global_aux_loss`, `sinkhorn` or `none`."""
    moe_aux_loss_coeff: float | None = None
    """Weight of that loss."""
    moe_router_dtype: str | None = None
    """`fp32` or `fp64`: what the router computes in."""
    moe_router_bias_update_rate: float | None = None
    """Step by which the router's bias follows the load (DeepSeek V3)."""
    mtp_num_layers: int | None = None
    """Layers for multi-token prediction; 0 trains without those that the model has."""
    mtp_loss_scaling_factor: float | None = None
    """Weight of their loss."""

    calculate_per_token_loss: bool = True
    """Average the loss over all unmasked tokens of the global batch, so that it does not depend on the layout;
    false averages micro-batch means, as Megatron-Core does by default."""


SOURCE_FIELDS = ("hf_path", "hf_config", "load_weights")
"""Fields that say which model; all others are settings of its provider."""
